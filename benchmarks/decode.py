"""Decoding speed of one request after a long prompt, at full size, next to the limit set by reading the weights.
Where steps can be recorded as CUDA graphs, with and without them.

python benchmarks/decode.py                                     # as many layers of Mixtral 8x7B as the device has room for
python benchmarks/decode.py --model configs/model/tiny.json     # anywhere
"""

import argparse
import dataclasses
import random
import time
from pathlib import Path

import torch
from common import environment, pick_device, start_one_process

from accessory.certify.serving import Numbers
from accessory.checkpoint.description import load_args
from accessory.infer.decode_graph import can_record
from accessory.infer.engine import Engine
from accessory.infer.sampling import Sampling
from accessory.model.answering import in_pages
from accessory.model.args import ModelArgs
from accessory.model.build import model_without_weights
from accessory.model.decoder import Decoder
from accessory.model.logical import LogicalModel
from accessory.model.memory import memory_of
from accessory.model.moe.layouts import EXPERT
from accessory.parallel.mesh import ONE_RANK
from accessory.train.measure import measured_here

MIXTRAL = Path(__file__).parents[1] / "configs/model/mixtral-8x7b.json"
ROOM = 0.85
"""The share of the device's memory for weights."""


def layers_that_fit(args: ModelArgs, device: torch.device) -> ModelArgs:
    """The model, or as many of its layers as fit on the device in bf16."""
    one, two = (parameters(dataclasses.replace(args, n_layers=count)) for count in (1, 2))
    most = int((ROOM * memory_of(device) / 2 - one) // (two - one)) + 1
    return dataclasses.replace(args, n_layers=min(args.n_layers, most))


def parameters(args: ModelArgs) -> int:
    return sum(p.numel() for p in model_without_weights(LogicalModel(args), EXPERT, ONE_RANK, torch.bfloat16).parameters())


def random_model(args: ModelArgs, device: torch.device) -> Decoder:
    model = model_without_weights(LogicalModel(args), EXPERT, ONE_RANK, torch.bfloat16, trains=frozenset())
    model.to_empty(device=device)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.02)
    return model


def seconds_a_token(model: Decoder, context: int, new: int, graphs: bool) -> float:
    longest = in_pages(context + new)
    engine = Engine(model, Numbers(model.args.vocab_size), max_seq_len=longest, cache_tokens=longest, graphs=graphs)
    seconds = []
    for _ in range(3):  # the first warms up
        prompt = [random.randrange(3, model.args.vocab_size) for _ in range(context)]
        request = engine.submit(prompt, Sampling(max_tokens=new))
        while not request.answer:
            engine.step()
        start = time.perf_counter()
        for _ in engine.run():
            pass
        seconds.append((time.perf_counter() - start) / (new - 1))
    return min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MIXTRAL, metavar="CONFIG_JSON")
    parser.add_argument("--context", type=int, default=4096, help="tokens before the first that is written")
    parser.add_argument("--new", type=int, default=64)
    arguments = parser.parse_args()
    device = pick_device()
    start_one_process()
    print(environment())
    args = layers_that_fit(load_args(arguments.model), device)
    model = random_model(args, device)
    seconds = {"kernel by kernel": seconds_a_token(model, arguments.context, arguments.new, graphs=False)}
    if can_record(model):
        seconds["as graphs"] = seconds_a_token(model, arguments.context, arguments.new, graphs=True)
    experts = args.moe.num_experts_per_tok / args.moe.num_experts
    stored = parameters(args)
    expert_numbers = 3 * args.n_layers * args.moe.num_experts * args.dim * args.hidden_dim
    read = 2 * (stored - (1 - experts) * expert_numbers - args.vocab_size * args.dim)  # one row of the embedding
    card = measured_here(None)
    limit = card.elementwise * card.memory_rate / read
    for how, one in seconds.items():
        reached = f"{1 / one:.1f} tokens/s, {1 / one / limit:.0%} of what reading the weights allows"
        print(f"{args.n_layers} layers, {arguments.context} tokens of context, {how}: {reached}")


if __name__ == "__main__":
    main()
