#!/usr/bin/env bash
# LoRA, biases and norms (normBiasLora), sparse layout.
# srun -n16 --gres=gpu:8 --ntasks-per-node=8 --kill-on-bad-exit=1 bash $0 CKPT_DIR CONFIG_JSON TOKENIZER [key.sub=value ...]
. "$(dirname "$0")/../recipe.sh" sg/dialog_ultrachat200kWizardcode_part \
    model.layout=mixtral_sparse tuning.lora.rank=16 tuning.bias=true tuning.train=norms out=runs/dialog_ultrachat200kWizardcode_mixtralSparsePeft -- "$@"
