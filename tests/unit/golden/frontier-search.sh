#!/bin/bash -l
# dmi launch: search on Frontier (OLCF), AMD MI250X
#SBATCH --job-name=dmi-elemnet
#SBATCH --nodes=16
#SBATCH --time=02:00:00
#SBATCH --account=mat123
#SBATCH --partition=batch
#SBATCH --constraint=nvme
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=56
#SBATCH --gpus-per-node=8
#SBATCH --signal=B:USR1@180
#SBATCH --no-requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=/scratch/ada/runs/elemnet/logs/job-%j.out
#SBATCH --network=disable_rdzv_get

# The software of this machine.
module load PrgEnv-gnu/8.7.0 || exit 2
module load cpe/26.03 || exit 2
module load rocm/7.1.1 || exit 2
module load rccl-net-plugin || exit 2
module load craype-accel-amd-gfx90a || exit 2
export LD_LIBRARY_PATH="${CRAY_LD_LIBRARY_PATH:-}:${LD_LIBRARY_PATH:-}"
# Its network and its devices.
export NCCL_SOCKET_IFNAME=hsn0,hsn1,hsn2,hsn3
export FI_CXI_RDZV_PROTO=alt_read
export MIOPEN_USER_DB_PATH="/tmp/miopen-${USER}-${SLURM_JOB_ID}"
export MIOPEN_CUSTOM_CACHE_DIR="/tmp/miopen-${USER}-${SLURM_JOB_ID}"
# What this job writes is its user's alone; nothing is imported from the folder it starts in.
umask 077
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

# All the rest is this command's, which takes the place of the shell: signals reach it.
exec /home/ada/env/bin/python -P -m dmi_hpc launch \
  --machine=frontier \
  --nodes=16 \
  --time=02:00:00 \
  --account=mat123 \
  --chain=dependency \
  --max-jobs=20 \
  --out=/scratch/ada/runs/elemnet \
  search \
  /home/ada/recipes/elemnet.toml
