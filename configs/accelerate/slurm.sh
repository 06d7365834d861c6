#!/bin/bash
# sbatch configs/accelerate/slurm.sh scripts/train_ldm.py my/ldm.yaml
# Change the lines below to your cluster; one task for each GPU. The folder is one that all nodes see.
#SBATCH --job-name=ldm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

# srun is the launcher: it hands SIGTERM on to every process, waits until they have saved, and tells exit code 75.
# torchrun would kill them after 30 seconds and say 1.
trap : TERM # the script itself outlives the signal, to requeue the job

export MASTER_ADDR MASTER_PORT PYTHON
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
PYTHON=${PYTHON:-.venv/bin/python}

# kill-on-bad-exit 0: the first that has saved must not end the others
srun --kill-on-bad-exit=0 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$PYTHON" "$@"' task "$@"
code=$?

if [ $code = 75 ]; then # interrupted and saved: the same command continues
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
