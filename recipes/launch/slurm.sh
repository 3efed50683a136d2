#!/usr/bin/env bash
# A cluster with SLURM: srun starts a process a GPU on every node, and Lightning reads its place from the environment.
#   sbatch recipes/launch/slurm.sh
#   sbatch --nodes 4 recipes/launch/slurm.sh --data.batch_size 16
# Submit it from the repository's folder, on a file system that all nodes share, with the data fetched beforehand
# (`vidprism data prepare`): compute nodes often have no network.

# To change: nodes, GPUs of a node, processor cores of a process (data.num_workers and one more), time.
#SBATCH --job-name=vidprism
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=9
#SBATCH --time=24:00:00
#SBATCH --output=vidprism-%j.log
# Two minutes before the time is over the run writes a checkpoint and has the job put back into the queue, where the
# same command goes on. --requeue does that too where a node fails, or the job makes room for another one.
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# To change: the recipe, the strategy (ddp or fsdp) and the environment.
RECIPE=${RECIPE:-recipes/k400.yaml}
STRATEGY=${STRATEGY:-ddp}
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi

# One task a GPU: Lightning refuses to run where devices and nodes are not what SLURM has started.
srun vidprism finetune --config "$RECIPE" \
  --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.num_nodes "$SLURM_JOB_NUM_NODES" \
  --trainer.strategy "$STRATEGY" "$@"
