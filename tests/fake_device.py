"""A device of limited memory where there is none: it counts the bytes of tensors that live, and has room for so many."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FakeDevice(TorchDispatchMode):
    """What operators make while it is entered lives on it.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, limit):
        super().__init__()
        self.limit, self.now, self.peak, self._known = limit, 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self.add(leaf)
        return made

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)
        if self.now > self.limit:
            raise MemoryError(f"the fake device has {self.limit:,} bytes, and {self.now:,} live on it")

    def _gone(self, key, size):
        del self._known[key]
        self.now -= size

    def hold(self, model):
        """What is on the device of a model that was made before."""
        for tensor in (*model.parameters(), *model.buffers(), *(experts.on_device for experts in model.offloaded)):
            self.add(tensor.data)
