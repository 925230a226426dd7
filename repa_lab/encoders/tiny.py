"""Whether an encoder has a tiny one of its kind."""

from __future__ import annotations

from repa_lab.encoders.encoder import EncoderError
from repa_lab.encoders.registry import TINY, facts_of
from repa_lab.encoders.weights import skeleton


def has_tiny(name: str) -> bool:
    """Whether the encoder is a vision transformer of timm, which can be built with two narrow blocks."""
    facts = facts_of(f"{TINY}{name}")
    assert facts is not None
    try:
        skeleton(name, facts)
    except (EncoderError, TypeError, RuntimeError):
        return False
    return True
