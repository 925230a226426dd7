"""A sweep: its plan, its scheduler, where runs are executed, and search. Importing the package costs no torch."""
