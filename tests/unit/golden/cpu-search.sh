#!/bin/bash
# dmi launch: search on a CPU cluster with Slurm
#SBATCH --job-name=dmi-elemnet
#SBATCH --nodes=16
#SBATCH --time=02:00:00
#SBATCH --account=mat123
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=/scratch/ada/runs/elemnet/logs/job-%j.out
#SBATCH --mem=0

# What this job writes is its user's alone; nothing is imported from the folder it starts in.
umask 077
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

# All the rest is this command's, which takes the place of the shell: signals reach it.
exec /home/ada/env/bin/python -P -m dmi_hpc launch \
  --machine=cpu \
  --nodes=16 \
  --time=02:00:00 \
  --account=mat123 \
  --chain=requeue \
  --max-jobs=20 \
  --out=/scratch/ada/runs/elemnet \
  search \
  /home/ada/recipes/elemnet.toml
