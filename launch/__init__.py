"""Starts jobs: on this machine, on the nodes of an allocation, in a batch system. Knows no genomes."""
