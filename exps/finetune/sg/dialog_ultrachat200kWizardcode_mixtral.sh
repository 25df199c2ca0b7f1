#!/usr/bin/env bash
# srun -n32 --gres=gpu:8 --ntasks-per-node=8 --kill-on-bad-exit=1 bash $0 CKPT_DIR CONFIG_JSON TOKENIZER [key.sub=value ...]
set -euo pipefail
checkpoint=$(realpath "$1") config=$(realpath "$2") tokenizer=$(realpath "$3")
cd "$(dirname "$0")/../../.."
exec python -m accessory finetune configs/finetune/sg/dialog_ultrachat200kWizardcode_mixtral.yaml \
    model.checkpoint="$checkpoint" model.config="$config" model.tokenizer="$tokenizer" "${@:4}"
