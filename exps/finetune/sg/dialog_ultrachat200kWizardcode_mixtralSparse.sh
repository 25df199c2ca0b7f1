#!/usr/bin/env bash
# Full finetuning, sparse layout.
# srun -n32 --gres=gpu:8 --ntasks-per-node=8 --kill-on-bad-exit=1 bash $0 CKPT_DIR CONFIG_JSON TOKENIZER [key.sub=value ...]
. "$(dirname "$0")/../recipe.sh" sg/dialog_ultrachat200kWizardcode_full \
    model.layout=mixtral_sparse out=runs/dialog_ultrachat200kWizardcode_mixtralSparse -- "$@"
