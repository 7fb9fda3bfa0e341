"""The algorithm: ask and tell, selection, surrogate, rungs. No Ray, no files, no clock."""
