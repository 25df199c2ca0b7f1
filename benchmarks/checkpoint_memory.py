"""Peak memory and time to convert a checkpoint, and to load it on two ranks, next to transformers.

    python benchmarks/checkpoint_memory.py            # makes a model of 2.2 GB in a temporary directory

Peak memory is each process's largest resident set, including mapped pages of files, minus that of a process that only
imports the same libraries.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import environment

MAKE = """
import sys, torch
from transformers import MixtralConfig, MixtralForCausalLM
config = MixtralConfig(vocab_size=8192, hidden_size=1024, intermediate_size=3584, num_hidden_layers={layers},
                       num_attention_heads=16, num_key_value_heads=8, num_local_experts=8, dtype=torch.bfloat16)
torch.set_default_dtype(torch.bfloat16)
MixtralForCausalLM(config).save_pretrained(sys.argv[1], max_shard_size="500MB")
"""
IMPORT = "import torch, accessory.model.meta"
LOAD = """
import torch, sys
import accessory.model.meta
from accessory.checkpoint.open import Checkpoint
from accessory.model.build import build_model
from accessory.model.moe.layouts import get_layout
from accessory.parallel.launch import join, leave, reach_store, read_environment
from accessory.parallel.mesh import make_mesh
launch = read_environment()
join(launch, reach_store(launch, 600))
mesh = make_mesh(launch.world)
source = Checkpoint(sys.argv[1])
layout = get_layout(sys.argv[2])
build_model(source.logical, layout, source, mesh=mesh, dtype=torch.bfloat16, device=torch.device("cpu"))
leave(0)
"""
IMPORT_PEER = "import torch; from transformers import MixtralForCausalLM"
PEER = """
import torch, sys
from transformers import MixtralForCausalLM
MixtralForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
"""


def measure(*commands: list[str]) -> tuple[list[float], float]:
    """Run commands side by side as the ranks of a job; returns each one's peak resident GB, and the seconds of the job."""
    start = time.perf_counter()
    processes = []
    for rank, command in enumerate(commands):
        job = {"RANK": rank, "WORLD_SIZE": len(commands), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29617}
        place = {key: str(value) for key, value in job.items()} if len(commands) > 1 else {}
        processes.append(
            subprocess.Popen(command, env=os.environ | place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
    peaks = []
    for process in processes:
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, process.args
        peaks.append(usage.ru_maxrss * 1024 / 1e9)
    return peaks, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="of a model of 0.18 GB each; default: %(default)s")
    arguments = parser.parse_args()
    python = [sys.executable, "-c"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "hf")
        subprocess.run([*python, MAKE.format(layers=arguments.layers), source], check=True, capture_output=True)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 1e9
        print(environment())
        print(f"a Mixtral of {size:.2f} GB (bf16, 8 experts, dim 1024, hidden_dim 3584), Hugging Face, several files")
        print("the largest stored tensor: 0.059 GB when cut for the sparse layout, 0.017 GB otherwise (embedding)\n")
        (base,), _ = measure([*python, IMPORT])
        (peer_base,), _ = measure([*python, IMPORT_PEER])
        accessory = [sys.executable, "-m", "accessory"]
        rows = []
        last = source
        for name, options in (
            ("mixtral mp 4", ["--to", "mixtral", "--mp", "4"]),
            ("mixtral_sparse mp 2, pth", ["--to", "mixtral_sparse", "--mp", "2", "--format", "pth"]),
            ("mixtral_sparse mp 1", ["--to", "mixtral_sparse"]),
            ("mistral", ["--to", "mistral"]),
            ("hf again", ["--to", "hf"]),
        ):
            out = Path(folder, name.replace(" ", "-"))
            (peak,), seconds = measure([*accessory, "convert", str(last), str(out), *options])
            rows.append((f"convert to {name}", peak - base, seconds))
            last = out
        (peak,), seconds = measure([*accessory, "verify", str(source), str(last)])
        rows.append(("verify the first against the last", peak - base, seconds))
        for layout in ("mixtral", "mixtral_sparse"):
            for kind, path in (("hf", source), ("sparse mp 2 pth", Path(folder, "mixtral_sparse-mp-2,-pth"))):
                peaks, seconds = measure(*[[*python, LOAD, str(path), layout]] * 2)
                rows.append((f"load {kind} as {layout}, a rank of two", max(peaks) - base, seconds))
        (peak,), seconds = measure([*python, LOAD, str(source), "mixtral"])
        rows.append(("load hf, one rank", peak - base, seconds))
        (peak,), seconds = measure([*python, PEER, str(source)])
        rows.append(("transformers: load, one process", peak - peer_base, seconds))
        print(f"{'':<44}{'peak GB':>9}{'of model':>10}{'seconds':>9}")
        for name, peak, seconds in rows:
            print(f"{name:<44}{peak:9.2f}{peak / size:9.0%} {seconds:9.1f}")


if __name__ == "__main__":
    main()
