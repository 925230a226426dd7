"""Frozen vision encoders. Importing the package or its `registry` imports no torch."""
