#!/usr/bin/env bash
# From a checkpoint to a talk with it on one small card. Experts and attention are written in 4 bits, once; then as many
# experts are on the card as fit in MEMORY beside all else, and the others in host memory, or on the disk of the directory DISK.
#
#   bash exps/one_small_card.sh CHECKPOINT MEMORY [DISK]        e.g. mixtral-8x7b 14GB
set -euo pipefail
checkpoint=$1 memory=$2 disk=${3:-}
quantised=${QUANTISED:-runs/one_small_card/$(basename "$checkpoint")-nf4}

if [ ! -d "$quantised" ]; then
    mkdir -p "$(dirname "$quantised")"
    accessory quantise "$checkpoint" "$quantised" --experts nf4 --attention nf4
fi
accessory chat "$quantised" --offload "device_memory=$memory${disk:+,disk=$disk}" ${CHAT:-}
