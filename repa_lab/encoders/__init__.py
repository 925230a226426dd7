"""Frozen vision encoders. Importing the package, or its `registry`, costs no torch."""
