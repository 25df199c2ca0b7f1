#!/usr/bin/env bash
# A model with images, in minutes: with a random, frozen encoder a small Mixtral learns to read real handwritten digits, in
# both layouts. It is then asked for held-out digits with their own image, with another one, and with none.
# Runs on up to two GPUs (NCCL), or without any on two CPU processes (gloo).
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/see

gpus=$(python -c "import torch; print(torch.cuda.device_count())")
processes=$((gpus > 1 ? 2 : gpus == 1 ? 1 : 2))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + processes - 1) / processes))}
title() { printf '\n\033[1m== %s\033[0m\n' "$1"; }

title "1. the digits that scikit-learn carries, and a tokenizer of their question and answers"
python exps/see_digits.py write $run/data
rm -f $run/data/tokenizer.model
accessory data tokenizer $run/data/mix.yaml $run/data/tokenizer.model --vocab-size 300
accessory data show configs/finetune/see.yaml -n 1

for layout in mixtral mixtral_sparse; do
    title "2. the training in the layout $layout, model parallel $processes"
    torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node $processes -m accessory finetune configs/finetune/see.yaml \
        parallel.model_parallel=$processes model.layout=$layout out=$run/$layout
    accessory generate $run/$layout/epoch* @$run/data/questions.jsonl --out $run/$layout/answers.jsonl \
        --precision fp32 --max-gen-len 8
done

title "3. who sees is right with the digit's own image, and only then"
python exps/see_digits.py check $run/data $run/answers.png $run/mixtral $run/mixtral_sparse
