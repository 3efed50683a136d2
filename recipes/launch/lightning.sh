#!/usr/bin/env bash
# One machine, several GPUs: the command starts one process, and Lightning the others, one a GPU.
#   recipes/launch/lightning.sh
#   RECIPE=recipes/ucf101.yaml DEVICES=2 recipes/launch/lightning.sh --data.batch_size 16
# `make finetune DATASET=k400 DEVICES=8 STRATEGY=ddp` does the same.
set -euo pipefail

# To change: the recipe, the number of GPUs, and the strategy (ddp, or fsdp where memory does not suffice).
RECIPE=${RECIPE:-recipes/k400.yaml}
DEVICES=${DEVICES:-8}
STRATEGY=${STRATEGY:-ddp}

# Batch size and loader processes are those of each process; what follows the script's name goes to the command line.
exec vidprism finetune --config "$RECIPE" \
  --trainer.devices "$DEVICES" --trainer.strategy "$STRATEGY" "$@"
