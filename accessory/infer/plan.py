"""The plan of a step, which the first model-parallel rank sends to the others as a list of numbers."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple


class StepPlan(NamedTuple):
    """What the ranks run in a step. All but ``ends`` and ``new`` have an entry for each document."""

    members: list[int]  # its adapter's number, see ``LogicalModel.member``
    tokens: list[list[int]]  # its new tokens; in the places of an image, the image's number, negated
    past: list[int]  # how many tokens it has had before
    begins: list[int]  # where its pages begin, see ``PagedCache.at``
    pages: list[list[int]]  # its pages of the cache
    ends: list[int]  # the documents whose next token is wanted
    shown: list[int]  # how many places of images it has had before
    new: list[int]  # the images whose pixels come with the plan

    def to_numbers(self) -> list[int]:
        numbers = [len(self.tokens), len(self.ends), len(self.new), *self.ends, *self.new]
        documents = zip(self.members, self.tokens, self.past, self.begins, self.pages, self.shown, strict=True)
        for member, tokens, past, begin, pages, shown in documents:
            numbers += [member, len(tokens), past, begin, len(pages), shown, *tokens, *pages]
        return numbers

    @classmethod
    def from_numbers(cls, numbers: Iterable[int]) -> "StepPlan":
        left = iter(numbers)

        def some(count: int) -> list[int]:
            return list(itertools.islice(left, count))

        count, ends, new = some(3)
        plan = cls([], [], [], [], [], some(ends), [], some(new))
        for _ in range(count):
            member, length, past, begin, pages, shown = some(6)
            plan.members.append(member)
            plan.past.append(past)
            plan.begins.append(begin)
            plan.shown.append(shown)
            plan.tokens.append(some(length))
            plan.pages.append(some(pages))
        return plan
