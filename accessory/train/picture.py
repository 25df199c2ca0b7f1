"""What every picture has in common: paper, letters, and how it is saved."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from accessory.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USUAL_FONT = "DejaVu Sans"  # comes with matplotlib
BOXES = "Last Resort"  # how the font begins that has every character, as a box


@contextmanager
def picture(path: Path, width: float, height: float, names: Sequence[str]) -> Iterator[tuple["Figure", list[str]]]:
    """A figure (``width`` x ``height`` inches) that is saved as a PNG when it is drawn, and ``names`` as it can write them:
    what no installed font has is escaped."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    fonts, lacking = _fonts(set("".join(names)))
    escaped = {ord(letter): letter.encode("unicode_escape").decode() for letter in lacking}
    with rc_context({"font.family": fonts, "text.parse_math": False}):  # a $ in a name is a $
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, [name.translate(escaped) for name in names]
        with replacing(path) as unfinished:
            figure.savefig(unfinished, dpi=120, format="png")


def _fonts(letters: set[str]) -> tuple[list[str], set[str]]:
    """Fonts, the usual one first, that write ``letters`` together; and those letters that no installed font has."""
    from matplotlib.font_manager import findfont, fontManager, get_font

    installed = [(font.name, font.fname) for font in fontManager.ttflist if not font.name.startswith(BOXES)]
    chosen, lacking = [USUAL_FONT], set(letters)
    for name, file in [(USUAL_FONT, findfont(USUAL_FONT)), *installed]:
        if not lacking:
            break
        found = {letter for letter in lacking if ord(letter) in get_font(file).get_charmap()}
        if found and name not in chosen:
            chosen.append(name)
        lacking -= found
    return chosen, lacking
