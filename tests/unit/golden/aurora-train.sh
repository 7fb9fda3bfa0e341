#!/bin/bash -l
# dmi launch: train on Aurora (ALCF), Intel Data Center GPU Max
#PBS -N dmi-elemnet
#PBS -l select=16
#PBS -l walltime=02:00:00
#PBS -A mat123
#PBS -q prod
#PBS -r n
#PBS -j oe
#PBS -k doe
#PBS -o /scratch/ada/runs/elemnet/logs/
#PBS -l place=scatter
#PBS -l filesystems=home:flare

# The software of this machine.
module load frameworks || exit 2
# Its network and its devices.
export ZE_FLAT_DEVICE_HIERARCHY=FLAT
export CCL_PROCESS_LAUNCHER=pmix
export CCL_ATL_TRANSPORT=mpi
export CCL_ALLREDUCE=topo
export CCL_ALLREDUCE_SCALEOUT=rabenseifner
export CCL_KVS_MODE=mpi
export CCL_KVS_CONNECTION_TIMEOUT=600
export CCL_KVS_USE_MPI_RANKS=1
export CCL_ZE_CACHE_OPEN_IPC_HANDLES_THRESHOLD=1024
export FI_MR_CACHE_MONITOR=disabled
export FI_CXI_RX_MATCH_MODE=hybrid
export FI_CXI_DEFAULT_CQ_SIZE=1048576
# What this job writes is its user's alone; nothing is imported from the folder it starts in.
umask 077
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

# All the rest is this command's, which takes the place of the shell: signals reach it.
exec /home/ada/env/bin/python -P -m dmi_hpc launch \
  --machine=aurora \
  --nodes=16 \
  --time=02:00:00 \
  --account=mat123 \
  --chain=dependency \
  --max-jobs=20 \
  --out=/scratch/ada/runs/elemnet \
  train \
  /home/ada/recipes/elemnet.toml
