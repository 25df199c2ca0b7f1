"""Facts of a model's training that its users and further training need. They are stored beside the weights.

DIR/training.json         the template of its data, and the settings of the routers' losses
DIR/chat_template.jinja   the same template for transformers and the servers of its models
"""

import dataclasses
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from accessory.config import from_mapping, read_mapping, write_json
from accessory.console import say
from accessory.data.jinja_templates import as_chat_template
from accessory.data.templates import get_template
from accessory.data.tokenizer import CHAT_TEMPLATES, TOKENIZERS, Tokenizer
from accessory.settings import BalanceMode

TRAINING = "training.json"


@dataclass(frozen=True)
class Training:
    """The content of training.json; None: not known.

    Attributes:
        template: a name in ``data/templates``, or "chat_template", the tokenizer's own.
        balance, z_loss_weight: as in the run's ``train``.
    """

    template: str | None = None
    balance: BalanceMode | None = None
    z_loss_weight: float | None = None

    @classmethod
    def read(cls, directories: Iterable[Path]) -> "Training":
        """If a model comes in several directories, the last one that has a training.json counts."""
        found = [path / TRAINING for path in directories if (path / TRAINING).is_file()]
        return from_mapping(cls, read_mapping(found[-1]), str(found[-1])) if found else cls()

    def write(self, directory: Path, trained: Tokenizer | None) -> None:
        """Write it beside a model's files. If the template is a named one, replace the chat template by its Jinja form.

        Args:
            trained: the tokenizer of training. transformers may read another file of the same tokenizer.
        """
        if self == Training():
            return
        write_json(directory / TRAINING, dataclasses.asdict(self))
        tokenizers = [directory / name for name in TOKENIZERS if (directory / name).is_file()]
        if trained is None or self.template in (None, "plain", "chat_template") or not tokenizers:
            return
        template = get_template(self.template)
        text = as_chat_template(template, trained, Tokenizer(tokenizers[-1]))
        for stale in CHAT_TEMPLATES.values():
            (directory / stale).unlink(missing_ok=True)
        shutil.rmtree(directory / "additional_chat_templates", ignore_errors=True)
        _change(directory / "tokenizer_config.json", {"chat_template": None})
        if text is None:
            say(
                f"warning: no chat template makes the tokens of '{self.template}' with {tokenizers[-1].name}: "
                "accessory generate knows it, transformers does not"
            )
            return
        (directory / CHAT_TEMPLATES["default"]).write_text(text, encoding="utf-8")
        stops = [trained.special[stop] for stop in template.stop if stop in trained.special]
        if stops:  # tokens that end an answer, beside </s>
            _change(directory / "generation_config.json", {"eos_token_id": [trained.eos_id, *stops]})


def _change(path: Path, values: dict[str, object]) -> None:
    """Change values in a JSON file, if it exists; None removes a key."""
    if path.is_file():
        changed = read_mapping(path) | values
        write_json(path, {key: value for key, value in changed.items() if key not in values or value is not None})
