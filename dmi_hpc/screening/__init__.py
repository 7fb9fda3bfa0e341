"""Screening: all compositions of chosen elements through a trained network, ranked by their hull."""
