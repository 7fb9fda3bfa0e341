"""Shard sets: built in parallel, checked when opened, read at the speed of memory."""
