"""What the first rank tells the others to run, as a row of numbers."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple


class StepPlan(NamedTuple):
    """What a model's ranks run in a step: of each document its new tokens, and where in the cache it is."""

    members: list[int]  # see ``LogicalModel.member``
    tokens: list[list[int]]
    past: list[int]
    begins: list[int]
    pages: list[list[int]]
    ends: list[int]  # the documents whose next token is wanted

    def to_numbers(self) -> list[int]:
        numbers = [len(self.tokens), len(self.ends), *self.ends]
        documents = zip(self.members, self.tokens, self.past, self.begins, self.pages, strict=True)
        for member, tokens, past, begin, pages in documents:
            numbers += [member, len(tokens), past, begin, len(pages), *tokens, *pages]
        return numbers

    @classmethod
    def from_numbers(cls, numbers: Iterable[int]) -> "StepPlan":
        left = iter(numbers)

        def some(count: int) -> list[int]:
            return list(itertools.islice(left, count))

        count, ends = some(2)
        plan = cls([], [], [], [], [], some(ends))
        for _ in range(count):
            member, length, past, begin, pages = some(5)
            plan.members.append(member)
            plan.past.append(past)
            plan.begins.append(begin)
            plan.tokens.append(some(length))
            plan.pages.append(some(pages))
        return plan
