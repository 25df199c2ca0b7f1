"""Writes a SentencePiece BPE model as a ``tokenizer.json``, which Hugging Face's libraries read.

transformers can read a tokenizer.model, too, but drops the space that SentencePiece puts before a text, so that every
sequence begins with another token than in training.
"""

from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from accessory.config import read_mapping, write_json

_format: Any = sentencepiece_model_pb2
ModelProto, TrainerSpec, Piece = _format.ModelProto, _format.TrainerSpec, _format.ModelProto.SentencePiece
SPACE = "\u2581"  # SentencePiece's letter for a space


def write_tokenizer_json(tokenizer_model: Path, directory: Path) -> bool:
    """Write tokenizer.json and tokenizer_config.json, which encode like ``tokenizer_model`` and put ``<s>`` in front.

    Returns:
        Whether that was possible. It is only for byte-pair encoding whose normalisation changes nothing but spaces.
    """
    model = ModelProto.FromString(tokenizer_model.read_bytes())
    pieces = [piece.piece for piece in model.pieces]
    kinds = [piece.type for piece in model.pieces]
    ids = model.trainer_spec.bos_id, model.trainer_spec.eos_id, model.trainer_spec.unk_id
    normalizer = model.normalizer_spec
    plain = normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces and not normalizer.precompiled_charsmap
    is_bpe = model.trainer_spec.model_type == TrainerSpec.BPE and Piece.USER_DEFINED not in kinds
    if not plain or not is_bpe or min(ids) < 0:
        return False
    bos, eos, unknown = (pieces[number] for number in ids)
    names = {"bos_token": bos, "eos_token": eos, "unk_token": unknown, "clean_up_tokenization_spaces": False}
    path = directory / "tokenizer_config.json"
    before = read_mapping(path) if path.exists() else {}  # a chat template may be in it
    write_json(directory / "tokenizer.json", _tokenizer(model, bos, unknown, before.get("legacy") is False))
    write_json(path, before | {"tokenizer_class": "PreTrainedTokenizerFast"} | names)
    return True


def _tokenizer(model: Any, bos: str, unknown: str, joined: bool) -> dict[str, Any]:
    """The content of tokenizer.json; ``joined``: no space is put before a text that follows a special token."""
    first = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    every = [{"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    pieces = [piece.piece for piece in model.pieces]
    special = [n for n, piece in enumerate(model.pieces) if piece.type in (Piece.CONTROL, Piece.UNKNOWN)]
    beginning = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
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
        "normalizer": None if joined else {"type": "Sequence", "normalizers": every},
        "pre_tokenizer": first if joined else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [beginning, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                beginning,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [model.trainer_spec.bos_id], "tokens": [bos]}},
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
            "merges": _merges(model),
        },
    }


def _merges(model: Any) -> list[list[str]]:
    """Every pair of pieces that joins to a piece, in SentencePiece's order of merging: the best-scored piece first."""
    known = {piece.piece: number for number, piece in enumerate(model.pieces)}
    found = []
    for number, piece in enumerate(model.pieces):
        for cut in range(1, len(piece.piece)) if piece.type == Piece.NORMAL else ():
            left, right = known.get(piece.piece[:cut]), known.get(piece.piece[cut:])
            if left is not None and right is not None:
                found.append((-piece.score, number, left, right))
    return [[model.pieces[left].piece, model.pieces[right].piece] for _, _, left, right in sorted(found)]
