"""What this machine's device reaches, found in seconds, in the place of what such cards were seen to reach elsewhere."""

import dataclasses
import time
from collections.abc import Callable

import torch

from accessory.console import say
from accessory.model.memory import memory_of
from accessory.parallel.launch import own_device
from accessory.train.cards import PCIE, PCIE_4, Card, card_of


def measured_here(card: Card | None) -> Card:
    """``card``, or the one that is here, with what its products and its memory reach; a CPU counts as one."""
    device = own_device()
    size = 8192 if device.type == "cuda" else 1024
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    first, second = torch.ones(2, 2**30 if device.type == "cuda" else 2**26, device=device, dtype=torch.uint8)
    flops = 2 * size**3 / _best(lambda: x @ x, device)
    rate = 2 * len(first) / _best(lambda: first.copy_(second), device)
    if card is None and device.type == "cuda" and (found := card_of(torch.cuda.get_device_name(device))):
        card = found[1]
    if card is None:
        card = Card((), memory_of(device) / 2**30, flops, rate, PCIE, PCIE, PCIE_4)
    say(f"measured here: {flops / 1e12:.3g} TFLOP/s in bf16 products of {size}, {rate / 1e9:,.0f} GB/s of memory")
    return dataclasses.replace(card, products=flops / card.flops, elementwise=rate / card.memory_rate)


def _best(body: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Seconds of the best of a few, each long enough to be seen."""
    return min(seconds_of(body, device) for _ in range(repeats))


def seconds_of(body: Callable[[], object], device: torch.device) -> float:
    """Seconds until the ``device`` has done what ``body`` asks of it, and nothing before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    body()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
