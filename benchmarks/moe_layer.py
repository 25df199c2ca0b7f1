"""Forward + backward time of one MoE layer: each kernel in each layout, next to transformers' own implementations, and to
a dense SwiGLU of the same FLOPs as the limit.

    python benchmarks/moe_layer.py

Routing is real (a random router, top 2 of 8), the router's time is included, and there are gradients of the inputs and all
weights. "decode" is a forward only, of 1 and 4 tokens. The figure is the dense layer's time over the implementation's: 1.00
is the limit.
"""

import argparse
from dataclasses import replace

import torch
import torch.nn.functional as F
from common import environment, pick_device, start_one_process, time_in_turn
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from accessory.certify.problem import SMALL
from accessory.model.args import ModelArgs, MoEArgs
from accessory.model.moe import MoE
from accessory.model.moe.layouts import LAYOUTS
from accessory.parallel.mesh import Axis

SMALL_SHAPE = replace(SMALL, dim=512, hidden_dim=1792, moe=MoEArgs(num_experts=8, num_experts_per_tok=2))


class Dense(nn.Module):
    """A dense SwiGLU with the FLOPs of top-K routing: K times the width."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        width = args.hidden_dim * args.moe.num_experts_per_tok
        self.w1, self.w3 = nn.Linear(args.dim, width, bias=False), nn.Linear(args.dim, width, bias=False)
        self.w2 = nn.Linear(width, args.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Ours(nn.Module):
    def __init__(self, shape: ModelArgs, layout: str, kernel: str):
        super().__init__()
        self.moe = MoE(shape, LAYOUTS[layout], Axis(), kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x[0])[0].unsqueeze(0)


def theirs(shape: ModelArgs, implementation: str) -> nn.Module:
    config = MixtralConfig(hidden_size=shape.dim, intermediate_size=shape.hidden_dim, num_local_experts=8)
    config._experts_implementation = implementation
    return MixtralSparseMoeBlock(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024, 4096, 8192])
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 4], help="tokens of a forward alone")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--full-size", action="store_true", help="Mixtral 8x7B's widths, in bf16, by every kernel of a GPU")
    arguments = parser.parse_args()
    start_one_process()
    device = pick_device()
    print(environment())
    shape, dtypes, layouts = SMALL_SHAPE, [torch.float32, torch.bfloat16], list(LAYOUTS)
    kernels, peers = ["grouped", "looped"], ["grouped_mm", "batched_mm", "eager"]
    if arguments.full_size:
        shape, dtypes, layouts = replace(shape, dim=4096, hidden_dim=14336), [torch.bfloat16], ["mixtral"]
        kernels, peers = ["grouped", "triton", "looped", "megablocks"], ["grouped_mm", "eager"]
    for dtype in dtypes:
        models = {f"{layout} / {kernel}": Ours(shape, layout, kernel) for layout in layouts for kernel in kernels}
        models |= {f"transformers / {name}": theirs(shape, name) for name in peers}
        models["dense (the limit)"] = Dense(shape)
        for model in models.values():
            model.to(device, dtype)
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.02)
        router = torch.randn(8, shape.dim, device=device).mul_(0.5)
        for model in models.values():
            for name, parameter in model.named_parameters():
                if "gate.weight" in name:
                    parameter.data.copy_(router)
        sizes = [*((tokens, False) for tokens in arguments.decode), *((tokens, True) for tokens in arguments.tokens)]
        print(f"\n{str(dtype).removeprefix('torch.')}: dense time / time (ms)")
        heads = (f"{tokens}" if trains else f"decode {tokens}" for tokens, trains in sizes)
        print(f"{'tokens':28s}" + "".join(f"{head:>18s}" for head in heads))
        rows: dict[str, str] = {name: f"{name:28s}" for name in models}
        for tokens, trains in sizes:
            x = torch.randn(1, tokens, shape.dim, device=device, dtype=dtype, requires_grad=True)
            upstream = torch.randn_like(x)

            def body(model: nn.Module, x: Tensor = x, upstream: Tensor = upstream, trains: bool = trains) -> None:
                if not trains:
                    with torch.inference_mode():
                        model(x)
                    return
                model.zero_grad(set_to_none=True)
                x.grad = None
                model(x).backward(upstream)

            # batched_mm copies the weights for every routed row: 15 GB at 1024 tokens
            running = {name: model for name, model in models.items() if tokens <= 256 or "batched" not in name}
            rounds = arguments.rounds * (4 if tokens <= 256 else 1)
            seconds = time_in_turn({name: lambda m=model: body(m) for name, model in running.items()}, rounds, device)
            for name in models:
                if name in seconds:
                    ratio = seconds["dense (the limit)"] / seconds[name]
                    rows[name] += f"{ratio:8.2f} ({seconds[name] * 1e3:6.1f})"
                else:
                    rows[name] += f"{'-':>17s}"
        print("\n".join(rows.values()), flush=True)


if __name__ == "__main__":
    main()
