"""A SentencePiece BPE model as the ``tokenizer.json`` that Hugging Face's libraries read.

transformers can read a tokenizer.model too, but drops the space that SentencePiece puts before a text, so that every
sequence begins with another token than the model was trained on.
"""

from pathlib import Path
from typing import Any

import sentencepiece

from accessory.config import read_mapping, write_json

SPACE = "\u2581"  # what SentencePiece writes for a space


def write_tokenizer_json(tokenizer_model: Path, directory: Path) -> bool:
    """Write tokenizer.json and tokenizer_config.json, which encode as ``tokenizer_model`` does and put ``<s>`` in front.

    Returns:
        Whether that was possible: not if the model changes the text in another way than by its spaces.
    """
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    if model.normalize(" \u00c9 \ufb01  a ") != f"{SPACE * 2}\u00c9{SPACE}\ufb01{SPACE * 2}a{SPACE}":
        return False
    pieces = [model.id_to_piece(number) for number in range(model.vocab_size())]
    bos, eos, unknown = (pieces[number] for number in (model.bos_id(), model.eos_id(), model.unk_id()))
    special = [number for number in range(len(pieces)) if model.is_control(number) or model.is_unknown(number)]
    beginning = {"SpecialToken": {"id": bos, "type_id": 0}}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": pieces[number],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number in special
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [beginning, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                beginning,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [model.bos_id()], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": _merges(model, pieces),
        },
    }
    write_json(directory / "tokenizer.json", content)
    names = {"bos_token": bos, "eos_token": eos, "unk_token": unknown, "clean_up_tokenization_spaces": False}
    path = directory / "tokenizer_config.json"
    before = read_mapping(path) if path.exists() else {}  # a chat template may be in it
    write_json(path, before | {"tokenizer_class": "PreTrainedTokenizerFast"} | names)
    return True


def _merges(model: sentencepiece.SentencePieceProcessor, pieces: list[str]) -> list[list[str]]:
    """Every pair of pieces that makes a piece, the best-scored piece first: the order in which SentencePiece merges."""
    known = {piece: number for number, piece in enumerate(pieces)}
    found = []
    for number, piece in enumerate(pieces):
        if model.is_control(number) or model.is_unknown(number) or model.is_byte(number):
            continue
        for cut in range(1, len(piece)):
            left, right = known.get(piece[:cut]), known.get(piece[cut:])
            if left is not None and right is not None:
                found.append((-model.get_score(number), number, left, right))
    return [[pieces[left], pieces[right]] for _, _, left, right in sorted(found)]
