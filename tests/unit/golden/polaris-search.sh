#!/bin/bash -l
# dmi launch: search on Polaris (ALCF), NVIDIA A100
#PBS -N dmi-elemnet
#PBS -l select=16:system=polaris
#PBS -l walltime=02:00:00
#PBS -A mat123
#PBS -q prod
#PBS -r n
#PBS -j oe
#PBS -k doe
#PBS -o /scratch/ada/runs/elemnet/logs/
#PBS -l place=scatter
#PBS -l filesystems=home:eagle

# The software of this machine.
export LD_LIBRARY_PATH="/soft/libraries/aws-ofi-nccl/v1.9.1-aws/lib:/soft/libraries/hwloc/lib:${LD_LIBRARY_PATH:-}"
# Its network and its devices.
export NCCL_NET='AWS Libfabric'
export NCCL_NET_GDR_LEVEL=PHB
export NCCL_CROSS_NIC=1
export NCCL_COLLNET_ENABLE=1
export FI_CXI_DISABLE_HOST_REGISTER=1
export FI_MR_CACHE_MONITOR=userfaultfd
export FI_CXI_DEFAULT_CQ_SIZE=131072
# What this job writes is its user's alone; nothing is imported from the folder it starts in.
umask 077
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

# All the rest is this command's, which takes the place of the shell: signals reach it.
exec /home/ada/env/bin/python -P -m dmi_hpc launch \
  --machine=polaris \
  --nodes=16 \
  --time=02:00:00 \
  --account=mat123 \
  --chain=dependency \
  --max-jobs=20 \
  --out=/scratch/ada/runs/elemnet \
  search \
  /home/ada/recipes/elemnet.toml
