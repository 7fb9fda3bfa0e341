"""What `dmi launch check` measures on the nodes, and what it makes of that."""
