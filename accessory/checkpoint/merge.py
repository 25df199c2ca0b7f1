"""A base with its LoRA adapters merged: W + scaling * B A, computed on reading."""

from dataclasses import replace

import torch
from torch import Tensor

from accessory.checkpoint.open import Checkpoint
from accessory.dtypes import at_least
from accessory.model.adapter import Adapter, adapter_name, name_of_a
from accessory.model.logical import EMBEDDING, LogicalModel, Region, as_matrix


class Merged:
    """``checkpoint`` as a source in which LoRA adapters are merged into their matrices; biases stay separate tensors.

    Quantised matrices stay quantised unless ``dense``, or unless any matrix has a LoRA adapter.

    Attributes:
        logical: its tensors.
        unchanged: trained tensors read so far in which no value changed after rounding to the base's precision.
    """

    def __init__(self, checkpoint: Checkpoint, dense: bool = False):
        self.checkpoint = checkpoint
        biased = {name: Adapter(bias=True) for name, adapter in checkpoint.logical.adapters.items() if adapter.bias}
        args = checkpoint.logical.args
        if dense or any(adapter.rank for adapter in checkpoint.logical.adapters.values()):
            args = replace(args, quantise=None)
        self.logical = LogicalModel(args, biased)
        self._replaced = checkpoint.base_model.dense.keys() & checkpoint.changed
        self._changed: dict[str, bool] = {}

    def read(self, name: str, region: Region) -> Tensor:
        value = self.checkpoint.read(name, region)
        adapter = self.checkpoint.logical.adapters.get(name)
        if name in self._replaced:
            self._note(name, value, self.checkpoint.read_base(name, region))
        if adapter is None or not adapter.rank:
            return value
        *groups, rows, columns = as_matrix(name, region)
        ranks = slice(0, adapter.rank)
        name_a, name_b = name_of_a(name, adapter), adapter_name(name, "lora_b")
        a = self.checkpoint.read(name_a, (*groups, ranks, columns))
        b = self.checkpoint.read(name_b, (*groups, rows, ranks))
        wide = value.to(torch.promote_types(at_least(value.dtype), a.dtype))
        a, b = a.to(wide.dtype), b.to(wide.dtype)
        delta = torch.matmul(b, a) * adapter.scaling
        merged = wide + (delta.mT if name == EMBEDDING else delta)
        self._note(name, merged, value)
        return merged

    def _note(self, name: str, after: Tensor, before: Tensor) -> None:
        self._changed[name] = self._changed.get(name, False) or not torch.equal(after.to(before.dtype), before)

    @property
    def unchanged(self) -> list[str]:
        return [name for name, changed in self._changed.items() if not changed]
