"""Search with Optuna: its space, its groups of seeds, its study, and what is wrong with how it was asked for."""
