"""The keys of a record. A reader takes those it uses; any other key is refused by name, never dropped in silence.

Not refused are a key without a value (null, "", [] or {}), ``METADATA``, what the mix entry names under ``ignore``, and a
text that was already taken under another key (UltraChat's ``prompt`` is its first message).
"""

from collections.abc import Collection, Mapping
from typing import Any

from accessory.errors import UserError

METADATA = frozenset(
    (
        *("id", "_id", "idx", "index", "uid", "uuid", "hash"),
        *("__index_level_0__", "Unnamed: 0", ""),  # pandas' names for its index: in parquet, read from csv, and in csv
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
"""Keys for a record's origin and category: nothing for a model to learn."""

NOTHING: tuple[Any, ...] = (None, "", [], {}, ())


class RecordError(UserError):
    """A record that cannot be used; the message says why.

    Attributes:
        problem: the message without the advice for the mix entry.
    """

    def __init__(self, problem: str, in_mix: str = ""):
        super().__init__(problem + in_mix)
        self.problem = problem


class Fields:
    """The keys of a record, or of an object in it.

    Attributes:
        where: its name in messages ("turn 3"); empty: the record itself. raw: its values, without ignored keys.
        texts: the texts taken so far from the whole record. images: likewise, the images that stand within texts.
    """

    def __init__(
        self,
        raw: Any,
        ignore: Collection[str] = (),
        columns: Mapping[str, str] | None = None,
        where: str = "",
        within: "Fields | None" = None,
    ):
        """``columns``: the object's names of keys that are read under another name. ``within``: the record it belongs to."""
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
        """Whether ``key`` has a value."""
        return self.raw.get(key) not in NOTHING

    def name(self, key: str) -> str:
        """The name of a key in messages: the record's own name for it."""
        column, place = self._columns.get(key), f"{self.where}: " if self.where else ""
        return f"{place}'{key}'" if column is None else f"{place}'{column}' (read as '{key}')"

    def names(self) -> str:
        """All keys, for messages."""
        return ", ".join(f"'{self._columns.get(key, key)}'" for key in self.raw) or "none"

    def inside(self, raw: Any, where: str) -> "Fields":
        """The keys of an object within this record; ``where`` is its name in messages."""
        return Fields(raw, self._ignore, where=where, within=self)

    def take(self, key: str) -> Any:
        """Take the value of ``key``; None if there is none."""
        self._taken.add(key)
        return self.raw.get(key)

    def text(self, key: str, needed: bool = False) -> str:
        """Take the text of ``key``; empty if there is none and it is not ``needed``."""
        value = self.take(key)
        if value is None and not needed:
            return ""
        self.texts.append(whole_text(value, self.name(key)))
        return self.texts[-1]

    def refuse_rest(self) -> None:
        """Finish reading this object.

        Raises:
            RecordError: a key was not taken; the message names it and what to do.
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
    """Check that ``value`` is a text and return it; ``what`` and ``kind`` name it in messages."""
    if not isinstance(value, str):
        raise RecordError(f"{what} must be a {kind}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{what} holds half a character (a lone surrogate)") from error
    return value
