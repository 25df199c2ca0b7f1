"""What a person sees: rank 0 speaks, and long steps show a bar on a terminal."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm


def is_main() -> bool:
    """Whether this is rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text: str = "") -> None:
    """Print a line on rank 0, above any progress bar."""
    if is_main():
        tqdm.write(text)
        sys.stdout.flush()


def tell(text: str) -> None:
    """Print a line on rank 0, beside what a program prints that may be read by another."""
    if is_main():
        tqdm.write(text, file=sys.stderr)


def listed(texts: Sequence[str], most: int | None = 4, separator: str = ", ") -> str:
    """The first ``most`` of some texts (None: all), and how many more there are."""
    more = len(texts) - len(texts[:most])
    return separator.join(texts[:most]) + (f" and {more} more" if more else "")


def in_bytes(size: float) -> str:
    """A number of bytes as a person reads it: 93.4GB."""
    return tqdm.format_sizeof(size, "B")


def in_time(seconds: float) -> str:
    """A time as a person reads it: 1:02:03."""
    return tqdm.format_interval(seconds)


def complain(text: str) -> None:
    """Print why the program ends, on one line that can be searched for.

    Where torchrun has started it, torchrun prints a long report afterwards: the line stands at its end, too. There it takes
    the earliest failure, to the second, and the ranks that only follow may end in the same one.
    """
    line = f"accessory: error: {text}"
    print(line, file=sys.stderr, flush=True)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(report).write_text(json.dumps({"message": line, "timestamp": int(time.time()) - 1}))


def progress(items: Any = None, **options: Any) -> tqdm:
    """tqdm on rank 0's terminal; nothing elsewhere, nor where output goes to a file."""
    hidden = None if is_main() else True  # None: only where the output is a terminal
    return tqdm(items, disable=hidden, dynamic_ncols=True, **options)
