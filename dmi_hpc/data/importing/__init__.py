"""Other people's files -> shard sets: tables, compositions, arrays, images, structures.

Read `run.py` first: one pipeline for every kind of source.
"""
