#!/usr/bin/env bash
# Chat with a checkpoint on one small card. Experts and attention are quantised to 4 bits, once. Then the card holds as many
# experts as fit in MEMORY with everything else; the others are in host memory, or in the directory DISK.
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
