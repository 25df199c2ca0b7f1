"""Plant faults one by one and see that the check of each turns red: ``make faults``.

First every check must be green without a fault. The exit code is 1 if a fault is caught by nothing.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

from faults import EIGHT, EVERY, ROOMS
from faults.fault import Fault
from faults.runner import LIMIT_S, Checks, Outcome

Item = TypeVar("Item")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only faults whose room, name or check holds one of these")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="checks at a time; default: %(default)s")
    parser.add_argument("--together", action="store_true", help="eight of them in one copy: the check of each must be red")
    parser.add_argument("--list", action="store_true", help="show the faults and their checks, and run nothing")
    arguments = parser.parse_args()
    faults = [fault for name in EIGHT for fault in EVERY if fault.name == name] if arguments.together else EVERY
    faults = [fault for fault in faults if _is_named(fault, arguments.names)]
    if arguments.list:
        print("\n".join(f"{_room(fault)}: {fault.name}\n    {fault.check}" for fault in faults))
        return 0
    checks = Checks()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return _report(checks, faults, arguments.jobs, arguments.together)
    except KeyboardInterrupt:
        return 130
    finally:
        checks.stop()


def _is_named(fault: Fault, names: Sequence[str]) -> bool:
    return not names or any(name in f"{_room(fault)}: {fault.name} {fault.check}" for name in names)


def _room(fault: Fault) -> str:
    return next(room for room, faults in ROOMS.items() if fault in faults)


def _report(checks: Checks, faults: Sequence[Fault], jobs: int, together: bool) -> int:
    """Print what becomes of each check and each fault; returns the exit code."""
    every_check = list(dict.fromkeys(fault.check for fault in faults))
    print(f"{len(every_check)} checks without a fault: all must be green")
    plain: dict[str, Outcome] = {}
    for check, outcome in _each(every_check, checks.run, jobs):
        plain[check] = outcome
        _say(outcome, check)
    sound = [fault for fault in faults if plain[fault.check].verdict == "green"]

    def run(fault: Fault) -> Outcome:
        limit_s = min(LIMIT_S, 30 + 5 * plain[fault.check].seconds)
        return checks.run(fault.check, faults if together else [fault], limit_s)

    print(f"\n{len(sound)} faults{' together' if together else ''}: all must be caught")
    outcomes: dict[str, Outcome] = {}
    for fault, outcome in _each(sound, run, jobs):
        outcomes[fault.name] = outcome
        _say(outcome, f"{_room(fault)}: {fault.name}", fault.check)
    caught = [name for name, outcome in outcomes.items() if outcome.caught]
    print(f"\n{len(faults)} faults, {len(caught)} caught")
    for fault in faults:
        if fault.name not in caught:
            why = outcomes[fault.name].verdict if fault.name in outcomes else "its check is not green without it"
            print(f"UNCAUGHT ({why}): {_room(fault)}: {fault.name}")
    return 0 if len(caught) == len(faults) else 1


def _each(items: Sequence[Item], body: Callable[[Item], Outcome], jobs: int) -> Iterator[tuple[Item, Outcome]]:
    """What becomes of each item, in their order; so many at a time, and a bar on a terminal."""
    pool = ThreadPoolExecutor(jobs)
    with tqdm(total=len(items), leave=False, disable=None) as bar:
        lock = threading.Lock()

        def counted(item: Item) -> Outcome:
            outcome = body(item)
            with lock:
                bar.update()
            return outcome

        try:
            yield from zip(items, pool.map(counted, items), strict=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _say(outcome: Outcome, what: str, check: str = "") -> None:
    words = {"red": "caught", "hang": "hangs", "green": "UNCAUGHT", "broken": "BROKEN"}
    word = words[outcome.verdict] if check else outcome.verdict
    tqdm.write(f"{word:8s} {outcome.seconds:5.1f} s  {what}")
    for line in filter(None, (check, outcome.piece)):
        tqdm.write(f"{'':18s}{line[:240]}")


if __name__ == "__main__":
    sys.exit(main())
