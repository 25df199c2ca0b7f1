"""Asynchronous saves: tensors are copied to host memory, and a thread writes them while training goes on.

The threads of all ranks communicate in a gloo group of their own, apart from the collectives of training.
"""

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.checkpoint.publish import prepare_directory, publish_directory, temporary_name
from accessory.console import is_main, say
from accessory.errors import UserError
from accessory.settings import LONGEST_COLLECTIVE_S

WAIT_TOLD_S = 1.0
"""If training waits longer than this for a save, that is printed."""


@dataclass(frozen=True)
class Save:
    """A directory to be written, and this rank's part of it, in host memory. All functions but ``saved`` get the directory's
    temporary path.

    Attributes:
        what: what it is, for the log.
        lay_out: makes the files that several ranks write into; called on each rank before any rank writes.
        write: writes this rank's part; what it returns is handed to ``finish``.
        finish: called on rank 0 with what ``write`` returned on each rank; completes the directory.
        saved: called on rank 0 when the directory has its final name.
    """

    directory: Path
    what: str
    write: Callable[[Path], Any]
    finish: Callable[[Path, list[Any]], None]
    lay_out: Callable[[Path], None] = lambda _: None
    saved: Callable[[], None] = lambda: None


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory. From a GPU it is under way until ``wait_for_copies``."""
    if tensor.device.type == "cpu":
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor.detach(), non_blocking=True)


def wait_for_copies() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def write_now(save: Save, group: dist.ProcessGroup | None = None) -> None:
    """Write a directory; it appears under its name when it is whole. Every rank of ``group`` must call this.

    Raises:
        UserError: it cannot be written; on all ranks alike, and nothing is left behind.
    """
    folder = temporary_name(save.directory)

    def on_main(body: Callable[[], Any]) -> Callable[[], Any]:
        return body if is_main() else lambda: None

    def publish() -> None:
        save.finish(folder, parts)
        publish_directory(save.directory)
        save.saved()

    try:
        _together(on_main(lambda: prepare_directory(save.directory)), save, group)
        _together(lambda: save.lay_out(folder), save, group)
        parts = _together(lambda: save.write(folder), save, group)
        _together(on_main(publish), save, group)
    except UserError:
        if is_main():  # a disk that is full needs the room
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _together(body: Callable[[], Any], save: Save, group: dist.ProcessGroup | None) -> list[Any]:
    """What ``body`` returned on each rank. If it fails on one, all ranks raise the same UserError."""
    result, problem = None, ""
    try:
        result = body()
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{save.directory}: cannot be written ({error.strerror}); what was saved before is whole"
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (result, problem), group=group)
    for _, text in outcomes:
        if text:
            raise UserError(text)
    return [found for found, _ in outcomes]


class Saver:
    """Writes saves in a thread, those of one step at a time. Every rank makes one, and calls its methods alike."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=LONGEST_COLLECTIVE_S))
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def begin(self, saves: Sequence[Save]) -> None:
        """Write ``saves``, one after the other, while training goes on; the ones before must be waited for."""
        assert self._thread is None
        name = ", ".join(str(save.directory) for save in saves)
        self._thread = threading.Thread(target=self._write, args=[saves], name=name, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a save that has failed."""
        if self._thread and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until all saves are written. Raises the error of one that has failed."""
        if self._thread:
            began = time.monotonic()
            self._thread.join()
            waited, name = time.monotonic() - began, self._thread.name
            self._thread = None
            if waited > WAIT_TOLD_S:
                say(f"waited {waited:.0f} s until {name} was written")
        if self._failure:
            raise self._failure

    def settle(self) -> None:
        """After a failure of training: wait for the saves that are under way, whether they succeed or not."""
        if self._thread:
            self._thread.join()

    def _write(self, saves: Sequence[Save]) -> None:
        try:
            for save in saves:
                began = time.monotonic()
                write_now(save, self._group)
                say(f"saved {save.directory} ({save.what}; {time.monotonic() - began:.1f} s)")
        except BaseException as error:  # the main thread raises it
            self._failure = error
