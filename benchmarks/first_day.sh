#!/usr/bin/env bash
# The first day on a GPU: what is to be known of this program there, in order of how much depends on it, into one file.
#
#     bash benchmarks/first_day.sh [OUT=first_day.txt]
#
# About 25 minutes on one GPU of 80 GB; what fails is said, and the rest goes on. It needs an idle machine.
set -u
cd "$(dirname "$0")/.."
out=${1:-first_day.txt}
python=${PYTHON:-.venv/bin/python}
export TRITON_INTERPRET=0
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "first_day.sh: no GPU here: nothing is measured" >&2
    exit 1
fi

part() { # title, seconds that it may take, command
    printf '\n== %s\n' "$1"
    timeout "$2" "${@:3}" 2>&1 || echo "FAILED ($?) after ${SECONDS} s"
}

{
    date -u +%F
    nvidia-smi --query-gpu=name,memory.total,driver_version,power.limit --format=csv
    "$python" -c 'import torch; print("torch", torch.__version__, "cuda", torch.version.cuda)'
    git describe --always --dirty
    part "1. the certificate: fp32 and bf16 here" 240 "$python" -m accessory certify --quick --device cuda --precision fp32
    part "1. the certificate in pieces" 240 "$python" -m accessory certify --quick --device cuda --precision bf16
    part "2. kernels, empty experts, attention, graphs, host waits, repeated steps, peak memory against the plan" 400 \
        "$python" -m pytest -m gpu tests/test_gpu.py -n 0 -p no:cacheprovider
    part "3. the experts at full size, against a dense layer of the same FLOPs" 300 \
        "$python" benchmarks/moe_layer.py --full-size --tokens 1024 4096 16384
    part "4. what this card reaches, and what the planner makes of it" 120 \
        "$python" -m accessory plan configs/model/mixtral-8x7b.json --measure --tuning lora --rows 4
    part "5. eight layers of Mixtral 8x7B with LoRA, and how far the planner is off" 300 \
        "$python" benchmarks/full_size.py --layers 8 --tuning lora
    part "5. two layers in full, 16384 tokens" 200 "$python" benchmarks/full_size.py --layers 2 --tuning full --rows 4
    part "5. LoRA next to PEFT, small" 200 "$python" benchmarks/train_step.py --lora 16
    part "6. answers, a token at a time" 200 "$python" benchmarks/generate.py
    part "6. the same at full size, behind 4096 tokens, kernel by kernel and as CUDA graphs" 200 "$python" benchmarks/decode.py
    part "6. the same behind 4096 tokens" 120 "$python" benchmarks/generate.py --long --rounds 3
    echo
    echo "all took ${SECONDS} s"
} | tee "$out"
