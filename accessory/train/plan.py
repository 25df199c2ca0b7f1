"""Which rows each optimiser step takes, and where a run stands."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Position:
    """Where a run stands. Rows count through the epochs; they, not steps, say which samples have been seen."""

    steps: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Step:
    """An optimiser step: rows ``start`` to ``stop`` of ``epoch``; ``after`` it the run stands there."""

    epoch: int
    start: int
    stop: int
    before: Position
    after: Position
    ends_epoch: bool


@dataclass(frozen=True)
class Plan:
    """The steps that are left of a run; a run that goes on with another global batch sees exactly the rows left.

    Attributes:
        epoch_rows: rows of each epoch; packed epochs differ by a few.
        global_batch: rows of a step; the last of an epoch may have fewer.
        done: where the run stands.
    """

    epoch_rows: tuple[int, ...]
    global_batch: int
    max_steps: int | None = None
    done: Position = Position()

    def steps(self) -> Iterator[Step]:
        at, earlier = self.done, 0
        for epoch, rows in enumerate(self.epoch_rows):
            for start in range(max(0, self.done.rows - earlier), rows, self.global_batch):
                if self.max_steps is not None and at.steps >= self.max_steps:
                    return
                stop = min(start + self.global_batch, rows)
                after = Position(at.steps + 1, earlier + stop)
                yield Step(epoch, start, stop, at, after, ends_epoch=stop == rows)
                at = after
            earlier += rows

    @cached_property
    def end(self) -> Position:
        """Where the run will stand when it is over."""
        end = self.done
        for step in self.steps():
            end = step.after
        return end
