"""the bridge to SimpleTuner: its config as a spec, a run's settings as its keys. Imports no torch."""
