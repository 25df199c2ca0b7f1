#!/usr/bin/env bash
# The main job in small, on real text: make a corpus and a tokenizer, finetune a small Mixtral in the expert layout and
# again, from the same start, in the sparse layout, compare the two, and let each answer a question. Then go on from one
# in the other layout with an adapter, fold it in, and let the result answer.
# Two processes on a CPU machine (gloo); every GPU where there are any (NCCL).
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/quickstart

gpus=$(python -c "import torch; print(torch.cuda.device_count())")
processes=$((gpus > 1 ? gpus - gpus % 2 : gpus == 1 ? 1 : 2))
model_parallel=$((processes > 1 ? 2 : 1))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + processes - 1) / processes))}
launch() { torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node "$processes" -m accessory "$@"; }
title() { printf '\n\033[1m== %s\033[0m\n' "$1"; }

title "1. corpus and tokenizer, from the standard library's documentation"
accessory data stdlib $run/data
accessory data tokenizer $run/data/mix.yaml $run/data/tokenizer.model --vocab-size 2048

for layout in mixtral mixtral_sparse; do
    title "2. finetune in the layout $layout, $processes processes, model parallel $model_parallel"
    launch finetune configs/finetune/quickstart.yaml model.layout=$layout out=$run/$layout \
        parallel.model_parallel=$model_parallel train.batch_size=$((16 * model_parallel / processes))
done

title "3. side by side"
accessory compare $run/mixtral $run/mixtral_sparse --png $run/compare.png

for layout in mixtral mixtral_sparse; do
    title "4. an answer from $run/$layout"
    accessory generate $run/$layout/epoch0-iter* "What does the function json.dumps do?" --max-gen-len 60 --precision fp64
done

title "5. an adapter: LoRA on attention and experts, from the expert layout's model, in the sparse layout"
base=$(echo $run/mixtral/epoch0-iter*)
launch finetune configs/finetune/quickstart.yaml model.checkpoint="$base" model.layout=mixtral_sparse out=$run/lora \
    tuning.lora.rank=8 optim.lr=5e-3 train.max_steps=20 \
    parallel.model_parallel=$model_parallel train.batch_size=$((16 * model_parallel / processes))

title "6. folded into its base, for Hugging Face"
rm -rf $run/merged
accessory merge "$base" $run/lora/epoch0-iter* $run/merged --to hf
accessory generate $run/merged "What does the function json.dumps do?" --max-gen-len 60 --precision fp64
