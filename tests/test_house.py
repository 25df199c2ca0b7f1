"""The rules of the house that can be counted (docs/tour.md, last paragraph): floors, sizes, names."""

import ast
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "accessory"
FLOORS = (  # from the ground; rooms of one floor do not import one another
    ("errors",),
    ("console", "files"),
    ("config",),
    ("dtypes", "settings"),
    ("listing", "parallel"),
    ("model",),
    ("visual",),
    ("data", "tuning"),
    ("checkpoint",),
    ("infer",),
    ("train",),
    ("certify",),
    ("verbs",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
REEXPORTS = {"model/meta.py", "model/multi_gpu_wrapper.py"}  # the import paths of LLaMA2-Accessory's users
FILES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(file):
    return file.split("/")[0].removesuffix(".py")


def imported(tree):
    """The rooms that a file imports, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (name.split(".")[1] for name in names if name and name.startswith("accessory."))


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py" and file not in REEXPORTS])
def test_a_room_imports_only_downwards(file):
    room = room_of(file)
    upward = {other for other in imported(FILES[file]) if other != room and FLOOR_OF[other] >= FLOOR_OF[room]}
    assert not upward, f"{file} imports {upward}"


def test_no_class_name_stands_for_two_things():
    names = Counter(node.name for tree in FILES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert not [name for name, count in names.items() if count > 1]


def test_a_file_and_a_function_can_be_held_in_the_head():
    for file, tree in FILES.items():
        assert len((PACKAGE / file).read_text().splitlines()) <= 400, file
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno + 1 <= 75, f"{file}: {node.name}"
