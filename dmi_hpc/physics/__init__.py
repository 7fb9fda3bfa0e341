"""Solvers and generators that make real training data, each verified against exact solutions."""
