"""The pages of the key-value cache: which sequences hold them, and which can be shared (prefix caching)."""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence

Key = bytes
"""Identifies the content of a full page: a hash of all tokens up to its end."""


def page_keys(tokens: Sequence[int], page_size: int, before: Key = b"") -> Iterator[Key]:
    """The key of each full page of ``tokens``, which follow a page with the key ``before``.

    For the first page of a sequence, ``before`` names what else its keys and values depend on (the adapter).
    """
    for end in range(page_size, len(tokens) + 1, page_size):
        before = hashlib.sha256(before + repr(list(tokens[end - page_size : end])).encode()).digest()
        yield before


class PagePool:
    """Pages 1 to ``count``, each held by any number of sequences. A full page that nobody holds any more keeps its content,
    for others to share, until the page is needed.

    Attributes:
        reserved: pages that are promised to sequences and not taken yet.
    """

    def __init__(self, count: int):
        self.count, self.reserved = count, 0
        self._blank = list(range(count, 0, -1))  # the next one to take is last
        self._holders: Counter[int] = Counter()
        self._known: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # held by nobody, but with known content; the oldest first

    @property
    def free(self) -> int:
        """How many pages can still be promised."""
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
        """Take one of the reserved pages, for new content."""
        self.reserved -= 1
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._known[self._keys.pop(page)]
        self._holders[page] = 1
        return page

    def learn(self, page: int, key: Key) -> None:
        """``page`` is full: sequences that begin with the tokens of ``key`` can share it from now on."""
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
