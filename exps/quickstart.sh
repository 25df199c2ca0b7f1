#!/usr/bin/env bash
# The whole workflow in minutes: a small Mixtral learns what functions of the standard library do. First some steps in both
# layouts from the same start, in fp64, with the same loss curve. Then full finetuning in one layout, an adapter on more
# modules in the other, merged into its base, and questions whose answers are checked.
# Runs on GPUs (NCCL), or without any on two CPU processes (gloo).
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/quickstart

gpus=$(python -c "import torch; print(torch.cuda.device_count())")
processes=$((gpus > 1 ? gpus - gpus % 2 : gpus == 1 ? 1 : 2))
model_parallel=$((processes > 1 ? 2 : 1))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + processes - 1) / processes))}
title() { printf '\n\033[1m== %s\033[0m\n' "$1"; }
finetune() {
    torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node "$processes" -m accessory finetune \
        configs/finetune/quickstart.yaml parallel.model_parallel=$model_parallel \
        train.batch_size=$((32 * model_parallel / processes)) "$@"
}
ask() {  # the first question is for the base, the others are for the adapter
    accessory generate "$1" --precision fp32 --max-gen-len 60 \
        "What does json.dumps do?" "Describe statistics.median in a sentence." "How would you describe textwrap.dedent?" |
        python exps/quickstart_questions.py check $run/data
}

title "1. questions and a tokenizer, from the standard library's documentation"
python exps/quickstart_questions.py write $run/data
rm -f $run/data/tokenizer.model
accessory data tokenizer $run/data/later.yaml $run/data/tokenizer.model --vocab-size 2048

# no load alarms: routers are not balanced in the first steps
for layout in mixtral mixtral_sparse; do
    title "2. the first 20 steps in the layout $layout, $processes processes, model parallel $model_parallel, fp64"
    finetune model.layout=$layout out=$run/$layout parallel.precision=fp64 train.max_steps=20 log.every=2 \
        log.alarms.load_min=null log.alarms.load_max=null
done
accessory compare $run/mixtral $run/mixtral_sparse --png $run/compare.png

title "3. the training, in the layout mixtral"
finetune
base=$(echo $run/model/epoch*)

title "4. what it answers: it has never heard of the modules statistics and textwrap"
ask "$base" || true

title "5. an adapter on six more modules: LoRA everywhere but on the router, in the layout mixtral_sparse"
# their names are new words: embeddings and output train too, and routing may change without an alarm
finetune data.mix=$run/data/later.yaml model.checkpoint="$base" model.layout=mixtral_sparse out=$run/lora \
    tuning.lora.rank=16 "tuning.lora.targets=[attention, experts, embeddings, output]" optim.lr=5e-3 \
    train.epochs=10 save.every_epochs=10 log.every=10 log.alarms.routing_change=null
rm -rf $run/merged
accessory merge "$base" $run/lora/epoch* $run/merged --to hf

title "6. what it answers now, the adapter folded in (a Hugging Face directory)"
ask $run/merged
printf '\n%s\n' "pictures: $run/compare.png $run/model/report.png $run/lora/report.png"
if [ -t 0 ] && [ -t 1 ]; then # a terminal
    title "7. ask it yourself: accessory chat $run/merged"
    accessory chat $run/merged --precision fp32 --max-gen-len 60 --temperature 0
fi
