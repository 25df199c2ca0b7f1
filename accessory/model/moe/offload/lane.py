"""What brings experts to the device beside what is computed: a thread, on a GPU with a stream of its own."""

import queue
import threading
import time
import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from accessory.errors import UserError
from accessory.model.moe.offload.records import ExpertStore
from accessory.parallel.watchdog import progressed

PATIENCE_S = 120.0
"""How long an expert may take to come; a disk that hangs is told then."""

GRACE_S = 10.0
"""How long what is under way may take when nobody needs it any more."""


class Load:
    """An expert on its way to a slot; who uses the slot has waited for it."""

    def __init__(self, store: ExpertStore, expert: int, slot: Tensor, before: Any):
        """``before``: what the device has still to do with what was in the slot (an event of its stream), or None."""
        self._store, self._expert, self._slot, self._before = store, expert, slot, before
        self._over = threading.Event()
        self._copied: Any = None
        self._error: Exception | None = None

    def run(self, stream: Any) -> None:
        """Done by the lane's thread."""
        try:
            with torch.cuda.stream(stream) if stream else nullcontext():
                if stream:
                    stream.wait_event(self._before)
                self._store.read(self._expert, self._slot)
                self._copied = stream.record_event() if stream else None
        except Exception as error:  # it is raised where the expert is waited for
            self._error = error
        finally:
            self._over.set()

    @property
    def failed(self) -> bool:
        """As far as is known."""
        return self._error is not None

    def wait(self) -> float:
        """Until the expert is there, for this thread and for what its stream does next; the seconds that this took.

        Raises:
            UserError: it cannot be read, or does not come.
        """
        start = time.monotonic()
        if not self._over.wait(PATIENCE_S):
            raise UserError(f"an expert has not come to the device in {PATIENCE_S:g} s: does the disk of offload.disk hang?")
        if self._error:
            raise self._error
        if self._copied:
            torch.cuda.current_stream(self._slot.device).wait_event(self._copied)
        progressed()
        return time.monotonic() - start


class Lane:
    """Brings experts one after the other, in the order that they are asked for."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._loads: queue.SimpleQueue[Load | None] = queue.SimpleQueue()
        thread = threading.Thread(target=_work, args=(self._loads, self._stream), name="offload", daemon=True)
        thread.start()
        weakref.finalize(self, _end, self._loads, thread)

    def fills(self, slots: Tensor) -> None:
        """Say that copies go to ``slots``: their memory is not used anew before the last has ended."""
        if self._stream:
            slots.record_stream(self._stream)

    def bring(self, store: ExpertStore, expert: int, slot: Tensor) -> Load:
        """Begin to; returns at once."""
        before = torch.cuda.current_stream(slot.device).record_event() if self._stream else None
        load = Load(store, expert, slot, before)
        self._loads.put(load)
        return load


def _end(loads: "queue.SimpleQueue[Load | None]", thread: threading.Thread) -> None:
    """A thread that is still at work where Python ends would take the process with it; one that hangs is not waited for."""
    loads.put(None)
    if thread is not threading.current_thread():
        thread.join(GRACE_S)


def _work(loads: "queue.SimpleQueue[Load | None]", stream: Any) -> None:
    while load := loads.get():
        load.run(stream)
