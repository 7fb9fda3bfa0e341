"""Trials on Ray: slots, devices, what the allocation has and how long it lasts."""
