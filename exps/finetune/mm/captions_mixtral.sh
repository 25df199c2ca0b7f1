#!/usr/bin/env bash
# Stage 1: only the connector, on captions; expert layout.
# CKPT_DIR: a visual model such as SPHINX-MoE; for a text model, add model.checkpoint=[BASE, ENCODERS] (docs/images.md).
# srun -n8 --gres=gpu:8 --ntasks-per-node=8 --kill-on-bad-exit=1 bash $0 CKPT_DIR CONFIG_JSON TOKENIZER [key.sub=value ...]
. "$(dirname "$0")/../recipe.sh" mm/stage1 \
    model.layout=mixtral out=runs/captions_mixtral -- "$@"
