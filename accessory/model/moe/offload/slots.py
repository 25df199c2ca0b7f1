"""Which of a layer's experts are on the device, and which make room for others: decisions, made without a byte moving."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

Policy = Literal["lru", "frequency"]
Place = tuple[int, int]
"""An expert, and the slot that it is to be brought to."""


@dataclass
class Tally:
    """What happened in a layer; an expert is used once by a batch, however many of its tokens go there.

    Attributes:
        used: experts that were used. hits: those of them that were on the device, or on their way there.
        guessed_hits: those of the hits that a guess had brought, and nothing had used since.
        guessed: experts named by guesses. foretold: experts used where a guess had been made; right: that it had named.
        moved: experts brought to the device.
    """

    used: int = 0
    hits: int = 0
    guessed_hits: int = 0
    guessed: int = 0
    foretold: int = 0
    right: int = 0
    moved: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.used)

    @property
    def recall(self) -> float:
        """How much of what was used had been guessed, where there was a guess."""
        return self.right / max(1, self.foretold)


class Slots:
    """``count`` slots for a layer's experts.

    ``policy``: of two experts that are not in use, lru gives up the one used longest ago, frequency the one used less often,
    and of equals the one used longest ago. What a guess brought goes before all others until it is used.

    Attributes:
        slot_of: where the experts are, or are about to be; those that make room first come first.
    """

    def __init__(self, count: int, policy: Policy = "lru"):
        self.count, self.policy, self.tally = count, policy, Tally()
        self.slot_of: dict[int, int] = {}
        self._free = list(reversed(range(count)))
        self._uses: dict[int, int] = {}
        self._held: set[int] = set()
        self._unproven: set[int] = set()  # brought by a guess, and not used since
        self._guess: set[int] | None = None

    def guess(self, experts: Iterable[int]) -> list[Place]:
        """These are likely to be used next: what is to be brought. More than there are slots say nothing."""
        guess = set(experts)
        if len(guess) > self.count - len(self._held):
            return []
        self._guess = guess
        self.tally.guessed += len(guess)
        places = self._bring(guess)
        early = [expert for expert, _ in places]
        self._unproven |= set(early)
        self.slot_of = {expert: self.slot_of[expert] for expert in (*early, *(e for e in self.slot_of if e not in early))}
        return places

    def judge(self, used: Iterable[int]) -> None:
        """These are used now, in one group or several: what was the guess worth?"""
        if self._guess is not None:
            used = set(used)
            self.tally.foretold += len(used)
            self.tally.right += len(used & self._guess)
            self._guess = None

    def hold(self, experts: Iterable[int]) -> list[Place]:
        """These are used now, beside those held already, until they are released: what is to be brought.

        There must be slots for all that is held at a time.
        """
        experts = sorted(experts)
        there = [expert for expert in experts if expert in self.slot_of]
        self.tally.used += len(experts)
        self.tally.hits += len(there)
        self.tally.guessed_hits += len(self._unproven & set(there))
        self._held |= set(experts)
        places = self._bring(experts)
        self._unproven -= self._held
        for expert in experts:
            self._uses[expert] = self._uses.get(expert, 0) + 1
            self.slot_of[expert] = self.slot_of.pop(expert)
        return places

    def release(self, experts: Iterable[int]) -> None:
        self._held -= set(experts)

    def release_all(self) -> None:
        self._held.clear()

    def lose(self, expert: int) -> None:
        """It was not brought after all."""
        self._free.append(self.slot_of.pop(expert))
        self._held.discard(expert)
        self._unproven.discard(expert)

    def _bring(self, experts: Iterable[int]) -> list[Place]:
        """Give those that are not there a slot."""
        kept = self._held | set(experts)
        places = []
        for expert in sorted(set(experts) - self.slot_of.keys()):
            if not self._free:
                self._free.append(self.slot_of.pop(gone := self._least(kept)))
                self._unproven.discard(gone)
            self.slot_of[expert] = self._free.pop()
            places.append((expert, self.slot_of[expert]))
        self.tally.moved += len(places)
        return places

    def _least(self, kept: set[int]) -> int:
        """Which expert makes room, of those that are not ``kept``."""
        order = [expert for expert in self.slot_of if expert not in kept]
        assert order, "more experts are held than there are slots"
        if self.policy == "lru":
            return order[0]
        return min(order, key=lambda expert: (expert not in self._unproven, self._uses.get(expert, 0)))


def groups_of(experts: list[int], slots: Slots) -> list[list[int]]:
    """``experts``, which a batch uses, in groups that fit: all at once, or each beside the next, which is brought meanwhile.

    They begin at the end that is on the device already: a batch goes up through a layer's experts, the next one down.
    """
    if len(experts) <= slots.count:
        return [experts]
    each = max(1, slots.count // 2)
    groups = [experts[first : first + each] for first in range(0, len(experts), each)]
    return groups[::-1] if experts[-1] in slots.slot_of and experts[0] not in slots.slot_of else groups


def in_turn(
    slots: Slots, groups: Sequence[list[int]], bring: Callable[[list[Place]], None], at_last: Callable[[], None]
) -> Iterator[list[int]]:
    """Each group while its experts are held; the next ones are brought meanwhile, if there are slots for both.

    Args:
        bring: begins to bring experts. at_last: is called when nothing more of this batch is to be brought.
    """
    bring(slots.hold(groups[0]))
    try:
        for group, following in zip(groups, [*groups[1:], []], strict=True):
            ahead = following if len(group) + len(following) <= slots.count else []
            bring(slots.hold(ahead))
            if not following:
                at_last()
            yield group
            slots.release(group)
            if not ahead:
                bring(slots.hold(following))
    finally:  # a use that failed holds nothing
        slots.release_all()
