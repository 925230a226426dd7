"""The bridge to the guide's trainer, SimpleTuner: its keys as a spec, and a run's settings as its keys. Imports no torch."""
