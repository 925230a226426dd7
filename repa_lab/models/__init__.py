"""Denoisers: their families as data, how they are built or loaded, where they are tapped, and what they cost."""
