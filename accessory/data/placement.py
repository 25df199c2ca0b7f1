"""The places of images among the tokens of a sample: each image takes as many places as the model makes words of it."""

from collections.abc import Sequence
from dataclasses import replace

from accessory.data.fields import RecordError
from accessory.data.record_images import IMAGE
from accessory.data.records import Document, Record
from accessory.data.tokenizer import Segment, Tokenizer
from accessory.model.visual import VisualArgs
from accessory.visual.images import Picture

PLACE = 2**31 - 1
"""The token id in the places of an image; larger than any vocabulary."""


def images_set_apart(record: Record, visual: VisualArgs | None) -> tuple[Record, tuple[Picture, ...]]:
    """The record without its images, and the images. Marks (IMAGE) in its text say where they stand; without marks they
    stand in the model's fixed place, or for an "inline" model at the beginning of the text.

    For a model with a fixed place, a single image always stands there, as in LLaMA2-Accessory, even if the text has a mark.

    Raises:
        RecordError: there is not one mark for each image, or a mark is not in a question.
    """
    images = record.images
    if visual is None:
        return record, ()  # a template refuses what has images
    asked, other = _texts(record)
    if any(IMAGE in text for text in other):
        raise RecordError(f"{IMAGE} stands in what is no question, where no image can stand")
    marks = sum(text.count(IMAGE) for text in asked)
    if marks and marks != len(images):
        raise RecordError(f"{IMAGE} stands {marks} times in it, and it has {len(images)} images: each must have its own")
    record = replace(record, images=())
    if visual.place != "inline" and marks == 1:
        record = _without_marks(record)
    elif visual.place == "inline" and not marks and images:
        record = _with_marks_first(record, len(images))
    return record, images


def _texts(record: Record) -> tuple[list[str], list[str]]:
    """The texts in which an image may stand, and the others."""
    if isinstance(record, Document):
        return [record.text], list(record.others)
    asked = [text for turn in record.turns if turn.role == "user" for text in (turn.text, turn.context)]
    return asked, [record.system or "", *(turn.text for turn in record.turns if turn.role != "user")]


def _without_marks(record: Record) -> Record:
    def changed(text: str) -> str:
        return text.replace(IMAGE, "").strip() if IMAGE in text else text

    if isinstance(record, Document):
        return replace(record, text=changed(record.text))
    turns = (replace(turn, text=changed(turn.text), context=changed(turn.context)) for turn in record.turns)
    return replace(record, turns=tuple(turns))


def _with_marks_first(record: Record, count: int) -> Record:
    """Put the marks where LLaVA's records have them."""
    marks = IMAGE * count
    if isinstance(record, Document):
        return replace(record, text=marks + record.text, others=tuple(marks + text for text in record.others))
    first, *later = record.turns
    return replace(record, turns=(replace(first, text=f"{marks}\n{first.text}"), *later))


def encode_placed(
    tokenizer: Tokenizer, segments: Sequence[Segment], images: int, visual: VisualArgs | None
) -> tuple[list[int], list[bool]]:
    """Like ``Tokenizer.encode_segments``, with the places of ``images`` images added, untrained.

    The text after a mark is encoded by itself, as LLaVA does it. Images in a fixed place do not change how text is encoded.

    Raises:
        RecordError: the template did not write each mark exactly once.
    """
    if not images:
        return tokenizer.encode_segments(segments)
    assert visual  # else there are no images
    stretches = _stretches(segments)
    marked = len(stretches) > 1
    if marked and len(stretches) != images + 1:
        raise RecordError(f"the template writes {len(stretches) - 1} of the {images} images that the questions show")
    ids, trained = list[int](), list[bool]()
    for number, stretch in enumerate(stretches):
        if number:
            ids += [PLACE] * visual.words
            trained += [False] * visual.words
        found, learnt = tokenizer.encode_segments(stretch)
        ids += found
        trained += learnt
    if not marked:
        start = int(visual.place == "after_bos" and ids[:1] == [tokenizer.bos_id])
        ids[start:start] = [PLACE] * images * visual.words
        trained[start:start] = [False] * images * visual.words
    return ids, trained


def _stretches(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Split segments at the marks of images."""
    stretches: list[list[Segment]] = [[]]
    for segment in segments:
        first, *more = [segment.text] if segment.special else segment.text.split(IMAGE)
        stretches[-1].append(replace(segment, text=first))
        stretches += [[replace(segment, text=text)] for text in more]
    return stretches
