"""What GPUs can do, by their makers' data sheets: dense bf16, without sparsity."""

from dataclasses import dataclass

from accessory.config import nearest
from accessory.errors import UserError


@dataclass(frozen=True)
class Card:
    """A GPU, and what connects it with others.

    Attributes:
        names: what ``torch.cuda.get_device_name`` says of it has all these words.
        gib: of memory. flops: of bf16 products, a second. memory_rate: bytes a second.
        link: bytes a second that it sends to the others of its node, all at once, as collectives reach them.
        network: the same to other nodes, its share of a node's.
        host: bytes a second that come from the host's memory, as such links were seen to reach.
        products, elementwise: what of ``flops`` and of ``memory_rate`` a training step was seen to reach (A100, H100).
    """

    names: tuple[str, ...]
    gib: float
    flops: float
    memory_rate: float
    link: float
    network: float
    host: float
    products: float = 0.62
    elementwise: float = 0.80


PCIE = 20e9
PCIE_3, PCIE_4, PCIE_5 = 12e9, 25e9, 50e9
"""From host memory, by 16 lanes."""
CARDS = {
    "a100-40": Card(("A100", "40GB"), 39.4, 312e12, 1.56e12, 230e9, 21e9, PCIE_4),
    "a100-80": Card(("A100",), 79.2, 312e12, 2.04e12, 230e9, 21e9, PCIE_4),
    "h100-pcie": Card(("H100", "PCIe"), 79.2, 756e12, 2.0e12, PCIE, 21e9, PCIE_5),
    "h100-nvl": Card(("H100", "NVL"), 93.1, 835e12, 3.9e12, PCIE, 21e9, PCIE_5),
    "h100": Card(("H100",), 79.2, 989e12, 3.35e12, 360e9, 45e9, PCIE_5),
    "h200": Card(("H200",), 139.8, 989e12, 4.8e12, 360e9, 45e9, PCIE_5),
    "b200": Card(("B200",), 178.4, 2250e12, 8e12, 700e9, 45e9, PCIE_5),
    "a800": Card(("A800",), 79.2, 312e12, 2.04e12, 160e9, 21e9, PCIE_4),
    "h800": Card(("H800",), 79.2, 989e12, 3.35e12, 160e9, 45e9, PCIE_5),
    "t4": Card(("T4",), 14.7, 65e12, 0.32e12, 10e9, 10e9, PCIE_3),
    "rtx-4090": Card(("RTX 4090",), 23.6, 165e12, 1.01e12, PCIE, 10e9, PCIE_4),
    "rtx-3090": Card(("RTX 3090",), 23.6, 71e12, 0.94e12, PCIE, 10e9, PCIE_4),
}
"""By the names that ``accessory plan --card`` takes. Of two whose words a device's name has, the first is meant."""


def card_called(name: str) -> Card:
    """Raises UserError: there is none of that name."""
    if name not in CARDS:
        raise UserError(f"--card: unknown card '{name}'{nearest(name, list(CARDS))}")
    return CARDS[name]


def card_of(device_name: str) -> tuple[str, Card] | None:
    """The card that a GPU's own name tells of."""
    return next(((name, card) for name, card in CARDS.items() if all(word in device_name for word in card.names)), None)
