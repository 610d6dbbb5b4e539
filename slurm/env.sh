# shellcheck shell=bash disable=SC1091,SC2034
# Site settings: the only file to edit for a cluster. Every script in this folder sources it.

# Options of sbatch for all jobs. `megatron-lite slurm submit` reads them here; before a plain `sbatch`, run
# `source slurm/env.sh`. Without a line, the cluster's default applies.
#export SBATCH_ACCOUNT=project@gpu
#export SBATCH_PARTITION=gpu
#export SBATCH_QOS=normal
#export SBATCH_CONSTRAINT=v100-32g

# Partitions of jobs that need no GPU (preprocess.slurm) and of jobs that need the internet (export_and_push.slurm).
# Empty: SBATCH_PARTITION.
CPU_PARTITION=
TRANSFER_PARTITION=

# Folders on a file system that all nodes share. $SCRATCH: set by many clusters.
DATA=${DATA:-$PWD/data}
RUNS=${RUNS:-${SCRATCH:-$PWD}/runs}

# Python: modules, then the virtual environment (python -m venv .venv; .venv/bin/pip install -e '.[slurm]').
#module purge
#module load python/3.12 cuda/12.4
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi

# Compute nodes without internet: read models and tokenizers from the cache only. Fill it on a login node: hf download NAME.
export HF_HUB_OFFLINE=1
#export HF_HOME=$SCRATCH/huggingface

# Network interface between the nodes (`ip -brief address`), if nodes resolve their own name to 127.0.1.1.
#export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
