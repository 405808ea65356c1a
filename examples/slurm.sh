#!/usr/bin/env bash
# sbatch examples/slurm.sh configs/imagenet_r50_mbv1.json
#SBATCH --job-name=unikd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

# SLURM signals 120 s before the end of its time: the run saves and ends, and the requeued job goes on from there.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    launch_distill.py --config "$1" --resume auto --set run.nodes="$SLURM_NNODES"
