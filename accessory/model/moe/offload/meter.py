"""What offloaded experts did: for people, and for a run's log."""

from collections.abc import Sequence
from typing import Any

from accessory.console import in_bytes
from accessory.model.moe.offload.experts import OffloadedExperts
from accessory.model.moe.offload.slots import Tally


def told(layers: Sequence[OffloadedExperts]) -> str:
    """A table of the layers since the model was made, and their sum."""
    lines = [f"{'offload':12}{'used':>10}{'on the device':>15}{'by a guess':>12}{'guess right':>13}{'moved':>10}"]
    tallies = [layer.slots.tally for layer in layers]
    for name, tally, nbytes in (
        *((f"layer {n}", tally, layer.moved_bytes) for n, (tally, layer) in enumerate(zip(tallies, layers, strict=True))),
        ("all", sum(tallies, Tally()), sum(layer.moved_bytes for layer in layers)),
    ):
        right = f"{tally.recall:.1%}" if tally.foretold else "-"
        by_guess = f"{tally.guessed_hits / max(1, tally.used):.1%}"
        lines.append(f"{name:12}{tally.used:10,}{tally.hit_rate:15.1%}{by_guess:>12}{right:>13}{in_bytes(nbytes):>10}")
    waited = sum(layer.waited_s for layer in layers)
    return "\n".join([*lines, f"waited for experts: {waited:.2f} s"])


class OffloadMeter:
    """Figures of this rank since they were asked for last; none if nothing is offloaded."""

    def __init__(self, layers: Sequence[OffloadedExperts]):
        self._layers = layers
        self._before = self._now()

    def _now(self) -> list[tuple[int, int, int, float]]:
        tallies = [layer.slots.tally for layer in self._layers]
        return [
            (tally.used, tally.hits, layer.moved_bytes, layer.waited_s)
            for tally, layer in zip(tallies, self._layers, strict=True)
        ]

    def metrics(self) -> dict[str, Any]:
        """By the names of docs/metrics.md."""
        if not self._layers:
            return {}
        before, self._before = self._before, self._now()
        since = [
            tuple(now - then for now, then in zip(*pair, strict=True)) for pair in zip(self._before, before, strict=True)
        ]
        used, hits, moved, waited = (sum(column) for column in zip(*since, strict=True))
        return {
            "offload_hit_rate": hits / max(1, used),
            "offload_moved_bytes": moved,
            "offload_waited_s": waited,
            "layer_offload_hit_rate": [layer[1] / max(1, layer[0]) for layer in since],
        }
