"""Listeners to a run's rows. The run directory is the truth; a listener may fail and nothing is lost."""

from repa_lab.tracking.journal import Journal, Listener

__all__ = ["Journal", "Listener"]
