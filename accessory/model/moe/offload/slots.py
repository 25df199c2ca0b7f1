"""The caching policy of offloaded experts: which of a layer's are on the device, and which are evicted; moves no bytes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

Policy = Literal["frequency", "lru"]
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


FADES = 0.98
"""The factor by which a past use loses weight with each batch: one half after 34 batches."""
TRUST = 8
"""A layer's guesses are trusted at first, as if this many had been right already."""
WORTH_BRINGING = 0.5
"""The share of a layer's guesses that must have been right for the next one to be brought."""


class Slots:
    """``count`` slots for a layer's experts.

    ``policy``: lru evicts the expert used longest ago; frequency the one used least often of late, and of equals the one
    used longest ago. Experts that a guess has brought are evicted first, until they are used.

    Attributes:
        slot_of: the slot in which each expert is, or is about to be; those to be evicted first come first.
    """

    def __init__(self, count: int, policy: Policy = "frequency"):
        self.count, self.policy, self.tally = count, policy, Tally()
        self.slot_of: dict[int, int] = {}
        self._free = list(reversed(range(count)))
        self._uses: dict[int, float] = {}
        self._held: set[int] = set()
        self._unproven: set[int] = set()  # brought by a guess, and not used since
        self._guess: set[int] | None = None

    @property
    def has_room(self) -> bool:
        """Whether one more expert can be held."""
        return len(self._held) < self.count

    def place(self, loads: Sequence[float]) -> list[Place]:
        """Begin with the experts that were used most elsewhere, as if they had been here: what is to be brought.

        ``loads``: how often a token uses each expert, at least 0.
        """
        self._uses = {expert: load / (1 - FADES) for expert, load in enumerate(loads)}
        order = sorted(self._uses, key=lambda expert: self._uses[expert])[-self.count :]
        places = self._bring(order)
        self.slot_of = {expert: self.slot_of[expert] for expert in order}
        return places

    def guess(self, experts: Iterable[int]) -> list[Place]:
        """These are likely to be used next: what is to be brought. More than there are slots say nothing.

        What a guess brings in vain is moved as well, before what is needed. So nothing is brought for a layer whose guesses
        are mostly wrong; they are judged all the same, and believed again when they are right.
        """
        guess = set(experts)
        if len(guess) > self.count - len(self._held):
            return []
        self._guess = guess
        self.tally.guessed += len(guess)
        if self.tally.right + TRUST < WORTH_BRINGING * (self.tally.guessed + TRUST):
            return []
        places = self._bring(guess)
        early = [expert for expert, _ in places]
        self._unproven |= set(early)
        self.slot_of = {expert: self.slot_of[expert] for expert in (*early, *(e for e in self.slot_of if e not in early))}
        return places

    def judge(self, used: Iterable[int]) -> None:
        """These are used now, by one batch: what was the guess worth?"""
        self._uses = {expert: FADES * uses for expert, uses in self._uses.items()}
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


def in_turn(
    slots: Slots, used: Iterable[int], bring: Callable[[list[Place]], None], at_last: Callable[[], None]
) -> Iterator[int]:
    """Each expert that a batch uses, while it is held: first those that are there, so that none makes room before its use.

    Where there are not slots for all, the next one is brought while one is used, and the policy says what makes room for it.

    Args:
        bring: begins to bring experts. at_last: is called when nothing more of this batch is to be brought.
    """
    order = sorted(used, key=lambda expert: (expert not in slots.slot_of, expert))
    absent = [expert for expert in order if expert not in slots.slot_of]
    ahead = len(order) if len(order) <= slots.count else 2
    try:
        slots.hold(order[: len(order) - len(absent)])
        if not absent:
            at_last()
        for number, expert in enumerate(order):
            while absent and len(order) - len(absent) < number + ahead and slots.has_room:
                bring(slots.hold([absent.pop(0)]))
                if not absent:
                    at_last()
            yield expert
            slots.release([expert])
    finally:  # a use that failed holds nothing
        slots.release_all()
