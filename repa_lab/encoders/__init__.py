"""Frozen vision encoders. Importing the room, or its `registry`, costs no torch."""
