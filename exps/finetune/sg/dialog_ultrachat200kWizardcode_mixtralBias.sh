#!/usr/bin/env bash
# Biases only, expert layout.
# srun -n16 --gres=gpu:8 --ntasks-per-node=8 --kill-on-bad-exit=1 bash $0 CKPT_DIR CONFIG_JSON TOKENIZER [key.sub=value ...]
. "$(dirname "$0")/../recipe.sh" sg/dialog_ultrachat200kWizardcode_part \
    model.layout=mixtral tuning.bias=true out=runs/dialog_ultrachat200kWizardcode_mixtralBias -- "$@"
