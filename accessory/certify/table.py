"""The certificate as text, JSON and HTML."""

import html
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from accessory import __version__
from accessory.certify.judge import Verdict

QUANTITIES = {
    "loss": "cross-entropy per target token, each step",
    "balance": "balance loss, each step",
    "z-loss": "router z-loss, each step",
    "counts": "rows that the router sends to each expert, per layer and step: exactly the same",
    "norm": "2-norm of the whole model's gradient before clipping, each step; bitwise the same on all ranks",
    "clipping": "what the gradient was multiplied by in the first step",
    "gradients": "of every tensor in the first step, after clipping",
    "weights": "of every tensor after the last step; what is frozen has not changed by a bit",
    "logits": "of every token of a sequence or batch",
    "tokens": "of the answers of requests that run together, drawn ones too, against each alone: none is another",
    "saved": "every tensor of the checkpoint that the model saves, against the format's description: exactly the same",
    "hf": "the same of Hugging Face's files: the model's own, and that checkpoint converted",
    "router": "logits, probabilities and weights, given its input",
    "choices": "the share of the tokens that go to other experts than in fp64, given the router's input",
    "norms": "the factor that RMSNorm multiplies a token's values by",
    "angles": "of the rotary embedding, up to position 600",
    "rotation": "a head that is turned by them",
    "attention": "output, given its input",
    "experts": "output, given their input",
    "head": "cross-entropy, given the last hidden state",
    "reduced": "gradients, against the sum in fp64 of all ranks' and micro-batches' own",
    "masters": "weights and moments of the training state after 31 steps, against AdamW in fp64 on the same gradients",
    "curve": "loss of each of 31 steps, of the first",
}
WIDTHS = {"dp": 4, "layout": 14, "given": 14, "recompute": len("norms_and_experts")} | dict.fromkeys(QUANTITIES, 7)


@dataclass
class Certificate:
    """All rows, and the environment in which they were made."""

    title: str
    about: dict[str, str]
    rows: list[Verdict] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows)

    def sections(self) -> list[list[Verdict]]:
        """The rows by kind of cell."""
        kinds: dict[type, list[Verdict]] = {}
        for row in self.rows:
            kinds.setdefault(type(row.cell), []).append(row)
        return list(kinds.values())

    def summary(self) -> str:
        failed = sum(not row.passed for row in self.rows)
        if not self.passed:
            return f"FAIL: {failed} of {len(self.rows)} cells"
        errors = [(error, row.bounds[name], name) for row in self.rows for name, error in row.errors.items()]
        error, bound, name = max(errors, key=lambda found: found[0] / found[1] if found[1] else 0.0)
        return f"PASS: {len(self.rows)} cells, largest error {error:.1e} ({name}), allowed {bound:.0e}"

    def to_json(self) -> dict[str, Any]:
        """Plain data; an error that is not finite is null."""
        rows = [
            {
                "cell": asdict(row.cell),
                "errors": {name: error if math.isfinite(error) else None for name, error in row.errors.items()},
                "bounds": {name: row.bounds[name] for name in row.errors},
                "passed": row.passed,
                "reason": row.reason,
            }
            for row in self.rows
        ]
        head = {"title": self.title, "passed": self.passed, "about": self.about}
        return head | {"rows": rows}


def quantities(rows: Sequence[Verdict]) -> list[str]:
    """All quantities compared in any row; a cell that failed early lacks some."""
    return list(dict.fromkeys(name for row in rows for name in row.errors))


def environment(device: str) -> dict[str, str]:
    """The versions, device and date of the results."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "accessory": __version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "device": f"{device} ({name})",
        "cores": str(os.cpu_count()),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def text_header(rows: Sequence[Verdict]) -> str:
    settings = (f"{name:<{_width(name)}}" for name in rows[0].cell.settings())
    return "  ".join([*settings, *(f"{name:>{_width(name)}}" for name in quantities(rows))])


def text_line(row: Verdict, names: Sequence[str]) -> str:
    """A row under its section's header; ``names``: the section's quantities."""
    settings = (f"{value:<{_width(name)}}" for name, value in row.cell.settings().items())
    errors = (f"{_number(row.errors[name]) if name in row.errors else '':>{_width(name)}}" for name in names)
    return "  ".join([*settings, *errors, "PASS" if row.passed else f"FAIL {row.reason or ''}".rstrip()])


def _width(name: str) -> int:
    return max(WIDTHS.get(name, 0), len(name))


def _number(error: float) -> str:
    return f"{error:.1e}" if error else "0"


def to_html(certificate: Certificate) -> str:
    """A page that needs no other file."""
    tables = "\n".join(_table(rows) for rows in certificate.sections())
    used = quantities(certificate.rows)
    terms = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in QUANTITIES.items() if name in used)
    about = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in certificate.about.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(certificate.title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(certificate.title)}</h1>
<p class="verdict {"pass" if certificate.passed else "fail"}">{html.escape(certificate.summary())}</p>
<p>Each line is one way to run the same computation. Its numbers are the largest relative errors against the reference:
dark green is far below what is allowed, paler nears it, red is beyond it.</p>
{tables}
<h2>What is compared</h2><dl>{terms}</dl>
<h2>How it was made</h2><dl>{about}</dl>
</body></html>
"""


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #1c2420 }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.verdict { font-size: 1.1rem; padding: .6rem 1rem; border-radius: .4rem }
.verdict.pass { background: #d9f0df } .verdict.fail { background: #f9d4cf }
table { border-collapse: collapse; margin: 1.5rem 0; font-variant-numeric: tabular-nums; font-size: .85rem }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #e3e8e5 }
th { position: sticky; top: 0; background: #fff } td.n { text-align: right; border-left: 2px solid #fff }
td.fail { background: #e5695b; color: #fff; font-weight: 600 } tr.fail td:last-child { color: #b3261e; font-weight: 600 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.5rem } dt { font-weight: 600 } dd { margin: 0 }
"""


def _table(rows: list[Verdict]) -> str:
    names = quantities(rows)
    head = "".join(f"<th>{name}</th>" for name in [*rows[0].cell.settings(), *names, ""])
    lines = []
    for row in rows:
        settings = "".join(f"<td>{html.escape(value)}</td>" for value in row.cell.settings().values())
        numbers = "".join(_cell(row, name) for name in names)
        verdict = "PASS" if row.passed else f"FAIL {html.escape(row.reason or '')}"
        lines.append(f'<tr class="{"pass" if row.passed else "fail"}">{settings}{numbers}<td>{verdict}</td></tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _cell(row: Verdict, quantity: str) -> str:
    if quantity not in row.errors:
        return "<td></td>"
    error = row.errors[quantity]
    if not row.passes(quantity):
        return f'<td class="n fail">{_number(error)}</td>'
    # white at the bound, full green five powers of ten below
    strength = min(1.0, 0.2 * math.log10(row.bounds[quantity] / error)) if error else 1.0
    return f'<td class="n" style="background: rgba(88, 176, 112, {strength:.2f})">{_number(error)}</td>'
