"""Who has which pages of a cache, and which pages hold a beginning that several sequences share."""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence

Key = bytes
"""Says what a full page holds: all tokens up to its end."""


def page_keys(tokens: Sequence[int], page_size: int, before: Key = b"") -> Iterator[Key]:
    """The key of each full page of ``tokens``, behind a page with key ``before``.

    Of a sequence's first page, ``before`` stands for whatever else its keys and values depend on.
    """
    for end in range(page_size, len(tokens) + 1, page_size):
        before = hashlib.sha256(before + repr(list(tokens[end - page_size : end])).encode()).digest()
        yield before


class PagePool:
    """Pages 1 to ``count``. A page is used by as many sequences as hold it; one that nobody holds, but whose content is
    known, is kept until its place is needed.

    Attributes:
        reserved: pages promised to sequences that have not taken them yet.
    """

    def __init__(self, count: int):
        self.count, self.reserved = count, 0
        self._blank = list(range(count, 0, -1))  # the next to be taken comes last
        self._holders: Counter[int] = Counter()
        self._known: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, and held by nobody: the oldest first

    @property
    def free(self) -> int:
        """Pages that can still be promised."""
        return len(self._blank) + len(self._idle) - self.reserved

    def is_known(self, key: Key) -> bool:
        return key in self._known

    def is_idle(self, key: Key) -> bool:
        return self._known.get(key) in self._idle

    def share(self, keys: Iterable[Key]) -> list[int]:
        """Hold the pages with these keys, up to the first that is not known."""
        pages = []
        for key in keys:
            if key not in self._known:
                break
            page = self._known[key]
            self._idle.pop(page, None)
            self._holders[page] += 1
            pages.append(page)
        return pages

    def take(self) -> int:
        """One of the reserved pages, its content to be written anew."""
        self.reserved -= 1
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._known[self._keys.pop(page)]
        self._holders[page] = 1
        return page

    def learn(self, page: int, key: Key) -> None:
        """``page`` is full: whoever begins with what ``key`` says can share it."""
        if key not in self._known:
            self._known[key], self._keys[page] = page, key

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._keys:
                self._idle[page] = None
            else:
                self._blank.append(page)
