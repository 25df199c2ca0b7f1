"""Which samples a step sees, in which rows and in which order."""

from faults.fault import Fault

LOADER, MIX, PACKING = "accessory/data/loader.py", "accessory/data/mix.py", "accessory/data/packing.py"
ONCE = "tests/test_data.py::test_every_sample_once_an_epoch"
LEFT = "tests/test_resume.py::test_another_global_batch_goes_through_exactly_the_rows_that_are_left"
RATIO = "tests/test_data.py::test_a_ratio_is_exact_and_always_the_same_share"

FAULTS = (
    Fault("every epoch has one order", MIX, 'f"{self.seed}/epoch/{epoch}"', 'f"{self.seed}/epoch/0"', RATIO),
    Fault(
        "the seed is ignored",
        MIX,
        'parts.append(Part(own.start, len(own), count, f"{self.seed}/part/{number}", skip))',
        'parts.append(Part(own.start, len(own), count, f"0/part/{number}", skip))',
        RATIO,
    ),
    Fault(
        "an epoch's rest begins where the one before began",
        MIX,
        "skip = 0 if entry.ratio else epoch * (count % len(own)) % len(own)",
        "skip = 0",
        "tests/test_data.py::test_epochs_repeat_and_take_other_records_for_the_rest",
    ),
    Fault(
        "the epoch's last batch lacks a sample",
        LOADER,
        "range(start, min(start + self.global_batch, len(rows)))",
        "range(start, min(start + self.global_batch, len(rows) - 1))",
        ONCE,
    ),
    Fault(
        "an epoch ends with its last full batch",
        "accessory/train/plan.py",
        "rows, self.global_batch):",
        "rows - self.global_batch + 1, self.global_batch):",
        LEFT,
    ),
    Fault(
        "ranks see one another's samples",
        LOADER,
        "first = (number * self.world + self.rank) * self.batch_size",
        "first = (number + self.rank) * self.batch_size",
        ONCE,
    ),
    Fault(
        "which samples a step sees depends on its ranks",
        LOADER,
        "chosen.sort(key=lambda row: lengths[row].sum())",
        "chosen = chosen[self.rank :] + chosen[: self.rank]",
        ONCE,
    ),
    Fault("dropout is alike in every epoch", LOADER, "epoch * len(samples) + i", "i", LEFT),
    Fault(
        "a row is one token too long",
        PACKING,
        "found = bisect_left(rooms, (length,))",
        "found = bisect_left(rooms, (length - 1,))",
        "tests/test_packing.py::test_every_sample_once_and_no_row_too_long",
        ((PACKING, "        assert length <= room,", "        assert length <= room + 1,"),),
    ),
    Fault(
        "what is held out is trained on, once",
        MIX,
        'self._before.searchsorted(index, side="right")',
        'self._before.searchsorted(index, side="left")',
        "tests/test_data.py::test_what_is_held_out_is_never_trained_on",
    ),
    Fault(
        "the first token of a long text's next part is never predicted",
        MIX,
        "range(0, len(tokens) - 1, max_seq_len - 1)",
        "range(0, len(tokens) - 1, max_seq_len)",
        "tests/test_commands.py::test_pretrain_goes_through_every_token_of_the_texts",
    ),
)
