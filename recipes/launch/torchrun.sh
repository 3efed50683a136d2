#!/usr/bin/env bash
# One machine or several, started by torchrun, which watches over the processes. Type it on every machine:
#   recipes/launch/torchrun.sh                                        one machine
#   NODES=2 HEAD=first-machine:29500 recipes/launch/torchrun.sh       two; HEAD is the same on both
# All machines must see the recipe, the data and the run's folder (output) at the same paths.
set -euo pipefail

# To change: the recipe, the GPUs of each machine, the machines, and the strategy (ddp or fsdp).
RECIPE=${RECIPE:-recipes/k400.yaml}
DEVICES=${DEVICES:-8}
NODES=${NODES:-1}
STRATEGY=${STRATEGY:-ddp}
# Where the machines meet: host and free port of the first one. Port 0, any that is free, does for one machine.
HEAD=${HEAD:-localhost:0}

# trainer.devices and trainer.num_nodes must be what torchrun starts: Lightning takes its processes as they are.
exec torchrun --nnodes "$NODES" --nproc-per-node "$DEVICES" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${RUN:-vidprism}" \
  -m vidprism_hf finetune --config "$RECIPE" \
  --trainer.devices "$DEVICES" --trainer.num_nodes "$NODES" --trainer.strategy "$STRATEGY" "$@"
