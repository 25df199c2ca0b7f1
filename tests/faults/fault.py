"""What a planted fault is, and how it is planted."""

from dataclasses import dataclass
from pathlib import Path

Change = tuple[str, str, str]
"""(file, old, new): the text ``old`` stands exactly once in the file, and ``new`` takes its place."""


@dataclass(frozen=True)
class Fault:
    """One subtle slip, and the check that must catch it.

    Attributes:
        name: what is wrong then.
        file, old, new: where. A search text outlives more changes of the code than the line numbers of a diff.
        check: a pytest node, or a command line of ``certify``.
        more: further changes that belong to the same slip.
    """

    name: str
    file: str
    old: str
    new: str
    check: str
    more: tuple[Change, ...] = ()

    @property
    def changes(self) -> tuple[Change, ...]:
        return ((self.file, self.old, self.new), *self.more)

    def planted(self, root: Path) -> dict[Path, str]:
        """The content of each file of ``root`` that the fault changes, with it.

        Raises:
            ValueError: it does not apply, or what it makes is no Python.
        """
        contents: dict[Path, str] = {}
        for file, old, new in self.changes:
            path = root / file
            text = contents.get(path) or path.read_text()
            if text.count(old) != 1 or old == new:
                raise ValueError(f"{self.name}: stands {text.count(old)} times in {file}: {old!r}")
            contents[path] = text.replace(old, new)
        for path, text in contents.items():
            if path.suffix != ".py":
                continue
            try:
                compile(text, path, "exec")
            except SyntaxError as error:
                raise ValueError(f"{self.name}: {path.name} is no Python then: {error}") from error
        return contents

    def plant(self, root: Path) -> None:
        for path, text in self.planted(root).items():
            path.write_text(text)
