"""A real corpus that every Python installation has: the docstrings and signatures of the standard library.

Source files are parsed, never imported, so that none of their code runs.
"""

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accessory.errors import UserError
from accessory.files import replacing

LONGEST_ANSWER = 600  # characters; longer documentation is cut after a paragraph
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages"}


@dataclass(frozen=True)
class Entry:
    """A documented function, method or class of the standard library."""

    name: str  # e.g. json.dumps
    kind: str  # function, method or class
    signature: str
    documentation: str


def stdlib_entries() -> Iterator[Entry]:
    """Every documented function, method and class, in alphabetical order of modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for top in sorted(sys.stdlib_module_names - SKIPPED):
        single = root / f"{top}.py"
        files = [single] if single.is_file() else sorted((root / top).rglob("*.py"))
        for file in files:
            parts = file.relative_to(root).with_suffix("").parts
            if SKIPPED.isdisjoint(parts):
                module = ".".join(part for part in parts if part != "__init__")
                yield from _walk(ast.parse(file.read_text(encoding="utf-8", errors="replace")), module, False)


def _walk(node: ast.AST, scope: str, in_class: bool) -> Iterator[Entry]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name, is_class = f"{scope}.{child.name}", isinstance(child, ast.ClassDef)
            documentation = ast.get_docstring(child)
            if documentation:
                if isinstance(child, ast.ClassDef):
                    bases = ", ".join(ast.unparse(base) for base in child.bases)
                    signature = f"class {child.name}({bases})" if bases else f"class {child.name}"
                else:
                    signature = f"{child.name}({ast.unparse(child.args)})"
                kind = "class" if is_class else "method" if in_class else "function"
                yield Entry(name, kind, signature, _shorten(documentation))
            yield from _walk(child, name, is_class)
        elif isinstance(child, ast.If | ast.Try):
            yield from _walk(child, scope, in_class)


def _shorten(documentation: str) -> str:
    if len(documentation) <= LONGEST_ANSWER:
        return documentation
    head = documentation[:LONGEST_ANSWER]
    return head[: head.rfind("\n\n")] if "\n\n" in head else head.rsplit(None, 1)[0]


def dialog_record(entry: Entry) -> dict[str, Any]:
    question = f"What does the {entry.kind} {entry.name} do?"
    answer = f"{entry.signature}\n\n{entry.documentation}"
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def instruction_record(entry: Entry) -> dict[str, str]:
    instruction = f"Write the signature of the Python {entry.kind} that fits this documentation."
    return {"instruction": instruction, "input": entry.documentation.split("\n\n")[0], "output": entry.signature}


def write_corpus(out: str | Path) -> dict[str, int]:
    """Write ``dialog.jsonl``, ``instruction.jsonl``, and ``mix.yaml`` that names both, into ``out``.

    Every entry becomes a dialog record, every fourth an instruction record too.

    Returns:
        The number of records in each file.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    entries = list(dict.fromkeys(stdlib_entries()))
    if not entries:
        raise UserError(f"{sysconfig.get_paths()['stdlib']}: no sources of the standard library here")
    files = {
        "dialog.jsonl": [dialog_record(entry) for entry in entries],
        "instruction.jsonl": [instruction_record(entry) for entry in entries[::4]],
    }
    for name, records in files.items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with replacing(out / name) as file:
            file.write_text(text, encoding="utf-8")
    with replacing(out / "mix.yaml") as file:
        file.write_text("META:\n" + "".join(f"  - path: {name}\n    type: text\n" for name in files))
    return {name: len(records) for name, records in files.items()}
