"""The bridge to and from SimpleTuner: its config as a spec, a run's settings as its keys. Imports no torch."""
