"""Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP while a run trains: all ranks end after the same step, and keep what they learnt."""

import os
import signal
from types import FrameType

import torch

from accessory.console import is_main
from accessory.errors import STOPS, Stopped, leave_closed_terminal, stop_on_signals
from accessory.parallel.mesh import Axis


class StopRequest:
    """Notes a signal instead of ending at once, from when it is made until ``close``.

    A second Ctrl-C does end at once. A second SIGTERM does not: Slurm sends it to every process, and torchrun to its ranks
    once more.
    """

    def __init__(self, world: Axis, device: torch.device):
        self._world, self._device, self._noted = world, device, 0
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._noted and number == signal.SIGINT:
            raise Stopped(number)
        leave_closed_terminal()
        self._noted = number
        if number == signal.SIGINT and is_main():  # a person waits; not by print, which may be what was interrupted
            os.write(2, b"accessory: Ctrl-C: the run ends after this step; once more, and it ends at once\n")

    def agreed(self) -> int:
        """The signal that a rank has noted, 0 if none has; the same on all ranks (a collective)."""
        noted = torch.tensor(self._noted, device=self._device)
        return int(self._world.all_reduce(noted, torch.distributed.ReduceOp.MAX))

    def close(self) -> None:
        """From now on a signal ends the program at once again."""
        stop_on_signals()
