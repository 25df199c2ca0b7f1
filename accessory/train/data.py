"""The data of a run: its samples, and the rows of each epoch."""

from functools import cached_property

import numpy as np

from accessory.console import say
from accessory.data.image_reader import ImageReader
from accessory.data.loader import sample_lengths
from accessory.data.mix import load_mix
from accessory.data.order import Order
from accessory.data.packing import Rows
from accessory.data.tokenizer import Tokenizer
from accessory.model.args import ModelArgs
from accessory.parallel.launch import Launch, first_on_each_node
from accessory.parallel.watchdog import progressed
from accessory.settings import DataSection
from accessory.train.state import data_digest


class RunData:
    """What a run trains on and is validated with.

    Attributes:
        training, validation: the samples. lengths: tokens of each training sample.
        template: the model's own from now on: that of most samples which are conversations.
        rows: of each epoch. bad_records: every record that is bad or dropped, with the reason.
        image_reader: reads their images; None: the model reads text alone.
    """

    def __init__(
        self,
        section: DataSection,
        tokenizer: Tokenizer,
        max_seq_len: int,
        model: ModelArgs,
        epochs: int,
        seed: int,
        launch: Launch,
    ):
        progressed("reading the data")
        self.packing, self.max_seq_len = section.packing, max_seq_len
        data = first_on_each_node(
            lambda: load_mix(
                section.mix,
                tokenizer,
                max_seq_len,
                seed,
                validation=section.validation,
                bad_records=section.bad_records,
                labels=model.labels,
                visual=model.visual,
            ),
            launch,
        )
        self.training, self.validation = data.training, data.validation
        self.image_reader = ImageReader(model.visual.size, section.bad_records == "skip") if model.visual else None
        self.lengths = sample_lengths(self.training)
        self.rows = [self.make_rows(data.epoch(epoch), self.lengths) for epoch in range(epochs)]
        self._keys = [store.key for source in data.sources for store in source.stores]
        self.bad_records = (line for source in data.sources for line in (*source.bad(), *source.dropped()))
        one_an_epoch = " (of an image's several captions one an epoch)" if self.training.retold.any() else ""
        say(
            f"data: {len(self.training)} samples to train on{one_an_epoch}, {len(self.validation)} held out; "
            f"{data.count('truncated')} truncated to {max_seq_len} tokens, {data.count('dropped')} dropped (no target left)"
        )
        if model.visual:
            said = f", {unseen} dropped since an image does not fit" if (unseen := data.count("unseen")) else ""
            say(f"images: {data.count('images')} of {model.visual.words} words each{said}")
            if not data.count("images"):
                say("warning: the model sees, and no record has an image: its connector is not trained")
        found = data.templates().most_common()
        chats = [name for name, _ in found if name != "plain"]
        self.template = chats[0] if chats else "plain"
        if len(found) > 1:
            told = ", ".join(f"{name} for {count} samples" for name, count in found)
            say(f"templates: {told}; the model's own, which accessory generate and an export take, is {self.template}")
        if section.packing:
            full = self.rows[0].tokens(self.lengths) / (len(self.rows[0]) * max_seq_len)
            say(f"packing: {len(self.rows[0])} rows of {max_seq_len} tokens, {full:.1%} full")

    def make_rows(self, order: Order, lengths: np.ndarray) -> Rows:
        """Rows of samples in ``order``, packed or not; ``lengths`` of all of them."""
        return Rows.packed(order, lengths, self.max_seq_len) if self.packing else Rows.alone(order)

    @cached_property
    def digest(self) -> str:
        """What a position in the data depends on."""
        return data_digest(self.rows[0], self.lengths, self._keys, self.packing)
