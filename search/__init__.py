"""Evolves networks: asynchronous genetic search with an SVM surrogate. Knows Ray, not Slurm."""
