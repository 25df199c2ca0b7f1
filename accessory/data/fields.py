"""What a record says, key by key. A reader takes what it uses; what is left is refused by name, never dropped in silence.

Left alone are a key that says nothing (null, "", [] or {}), ``METADATA``, what the mix entry names under ``ignore``, and
what was taken already under another name (UltraChat's ``prompt`` is its first message).
"""

from collections.abc import Collection, Mapping
from typing import Any

from accessory.errors import UserError

METADATA = frozenset(
    (
        *("id", "_id", "idx", "index", "uid", "uuid", "hash"),
        *("__index_level_0__", "Unnamed: 0", ""),  # what pandas calls its index, in parquet, read from csv, and in csv
        *("prompt_id", "question_id", "answer_id", "task_id", "message_id", "sample_id", "doc_id", "turn_id", "turn"),
        *("conversation_id", "conversation_hash", "num_turns", "num_tokens", "n_tokens", "token_count"),
        *("source", "sources", "data_source", "origin", "dataset", "dataset_name", "split", "subset", "dump", "version"),
        *("url", "path", "file", "filename", "file_name", "file_path", "repo", "author", "license", "meta", "metadata"),
        *("category", "categories", "subcategory", "type", "task", "task_name", "task_type", "tag", "tags"),
        *("subject", "topic", "domain", "level", "difficulty", "language", "language_score", "lang", "locale", "country"),
        *("date", "time", "timestamp", "created", "created_at", "added", "updated_at"),
        *("model", "model_name", "generator", "parallel_tool_calls"),
    )
)
"""Keys that say where a record is from and of what sort it is: nothing for a model to learn."""

NOTHING: tuple[Any, ...] = (None, "", [], {}, ())


class RecordError(UserError):
    """A record that cannot be used; the message says why.

    Attributes:
        problem: the message without what the entry of a data mix can do about it.
    """

    def __init__(self, problem: str, in_mix: str = ""):
        super().__init__(problem + in_mix)
        self.problem = problem


class Fields:
    """The keys of a record, or of an object in it.

    Attributes:
        where: what messages call it ("turn 3"); empty: the record itself. raw: what it says, without what is to be ignored.
        texts: of the whole record, those that were taken so far. images: likewise, those that stand among texts.
    """

    def __init__(
        self,
        raw: Any,
        ignore: Collection[str] = (),
        columns: Mapping[str, str] | None = None,
        where: str = "",
        within: "Fields | None" = None,
    ):
        """``columns``: what the object calls a key that is read under another name. ``within``: the record it is part of."""
        if not isinstance(raw, Mapping):
            raise RecordError(f"{where}{': ' * bool(where)}expected an object, found {type(raw).__name__}")
        self.where, self._columns, self._ignore = where, columns or {}, ignore
        self.raw = {key: value for key, value in raw.items() if key not in ignore}
        if columns:
            self._rename(columns)
        self.texts: list[str] = within.texts if within else []
        self.images: list[Any] = within.images if within else []
        self._taken: set[str] = set()

    def _rename(self, columns: Mapping[str, str]) -> None:
        for key, column in columns.items():
            if column in self.raw and key in self.raw and key not in columns.values():
                raise RecordError(f"'{key}' stands beside '{column}', which is read as '{key}': name one under ignore")
        names = {column: key for key, column in columns.items()}
        self.raw = {names.get(key, key): value for key, value in self.raw.items()}

    def says(self, key: str) -> bool:
        """Whether there is anything under ``key``."""
        return self.raw.get(key) not in NOTHING

    def name(self, key: str) -> str:
        """What messages call a key: the record's own name for it."""
        column, place = self._columns.get(key), f"{self.where}: " if self.where else ""
        return f"{place}'{key}'" if column is None else f"{place}'{column}' (read as '{key}')"

    def names(self) -> str:
        """All keys, for messages."""
        return ", ".join(f"'{self._columns.get(key, key)}'" for key in self.raw) or "none"

    def inside(self, raw: Any, where: str) -> "Fields":
        """The keys of an object of this record, which ``where`` names in messages."""
        return Fields(raw, self._ignore, where=where, within=self)

    def take(self, key: str) -> Any:
        """The value of ``key``, for use; None where there is none."""
        self._taken.add(key)
        return self.raw.get(key)

    def text(self, key: str, needed: bool = False) -> str:
        """The text of ``key``, for use; empty where there is none, unless it is ``needed``."""
        value = self.take(key)
        if value is None and not needed:
            return ""
        self.texts.append(whole_text(value, self.name(key)))
        return self.texts[-1]

    def refuse_rest(self) -> None:
        """End the reading of this object.

        Raises:
            RecordError: something was not taken; names it, and what can be done.
        """
        left = (key for key in self.raw if key not in self._taken and key not in METADATA)
        rest = [key for key in left if self.says(key) and self.raw[key] not in self.texts]
        if rest:
            it = "it" if len(rest) == 1 else "them"
            keys = ", ".join(map(str, rest))
            raise RecordError(
                f"{self.where}{': ' * bool(self.where)}nothing here uses {', '.join(map(repr, rest))}: leave {it} out",
                f" with ignore: [{keys}] in the mix entry, or say with columns what {it} should be read as",
            )


def whole_text(value: Any, what: str, kind: str = "text") -> str:
    """``value``, which must be a text; ``what`` and ``kind`` name it in messages."""
    if not isinstance(value, str):
        raise RecordError(f"{what} must be a {kind}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{what} holds half a character (a lone surrogate)") from error
    return value
