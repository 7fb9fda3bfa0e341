"""Starts jobs: ranks on this machine (MPI and Slurm later). Knows processes, not genomes."""
