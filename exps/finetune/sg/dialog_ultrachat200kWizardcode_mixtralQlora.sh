#!/usr/bin/env bash
# LoRA on attention and experts in 4 bits (QLoRA), expert layout.
# srun -n4 --gres=gpu:4 --ntasks-per-node=4 --kill-on-bad-exit=1 bash $0 CKPT_DIR CONFIG_JSON TOKENIZER [key.sub=value ...]
. "$(dirname "$0")/../recipe.sh" sg/dialog_ultrachat200kWizardcode_part \
    model.layout=mixtral model.quantise.experts=nf4 model.quantise.attention=nf4 tuning.lora.rank=16 train.accumulation=32 \
    out=runs/dialog_ultrachat200kWizardcode_mixtralQlora -- "$@"
