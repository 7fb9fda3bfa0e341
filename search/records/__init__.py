"""What a search writes and what others read of it: journals, islands, checkpoints kept, status."""
