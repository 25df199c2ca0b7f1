"""Which samples a step sees, in which rows and in which order."""

from faults.fault import Fault

LOADER, MIX, PACKING = "accessory/data/loader.py", "accessory/data/mix.py", "accessory/data/packing.py"
FIELDS, CHAT, TOOLS = "accessory/data/fields.py", "accessory/data/chat_template.py", "accessory/data/tool_use.py"
ONCE = "tests/test_data.py::test_every_sample_once_an_epoch"
LEFT = "tests/test_resume.py::test_another_global_batch_goes_through_exactly_the_rows_that_are_left"
RATIO = "tests/test_data.py::test_a_ratio_is_exact_and_always_the_same_share"

FAULTS = (
    Fault("every epoch has one order", MIX, 'f"{self.seed}/epoch/{epoch}"', 'f"{self.seed}/epoch/0"', RATIO),
    Fault(
        "the seed is ignored",
        MIX,
        'parts.append(Part(own.start, size, count, f"{self.seed}/part/{number}", skip, firsts, before))',
        'parts.append(Part(own.start, size, count, f"0/part/{number}", skip, firsts, before))',
        RATIO,
    ),
    Fault(
        "an epoch's rest begins where the one before began",
        MIX,
        "(0, epoch) if entry.ratio else (epoch * (count % size), epoch * (count // size))",
        "(0, epoch)",
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
        "first = (micro_step * self.world + self.rank) * self.batch_size",
        "first = (micro_step + self.rank) * self.batch_size",
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
    Fault(
        "what nobody uses of a turn is dropped",
        FIELDS,
        "rest = [key for key in left if self.says(key) and self.raw[key] not in self.texts]",
        "rest = [key for key in left if self.says(key) and self.raw[key] not in self.texts and not self.where]",
        "tests/test_formats.py::test_a_file_is_refused_by_name",
    ),
    Fault(
        "a score is taken for metadata",
        FIELDS,
        '"generator", "parallel_tool_calls"',
        '"generator", "score", "parallel_tool_calls"',
        "tests/test_formats.py::test_a_file_is_refused_by_name",
    ),
    Fault(
        "a label is dropped in silence, though it says that the answer is bad",
        "accessory/data/records.py",
        "        refuse_label(record)\n        return None",
        "        return None",
        "tests/test_formats.py::test_a_file_is_refused_by_name",
    ),
    Fault(
        "an instruction's history is left out",
        "accessory/data/records.py",
        'turns += [Turn("user", earlier), Turn("assistant", said)]',
        'turns = [Turn("user", earlier), Turn("assistant", said)]',
        "tests/test_formats.py::test_a_file_is_used_whole",
    ),
    Fault(
        "the columns are no part of a store's key",
        "accessory/data/sources.py",
        '_CHOOSING = ("path", ',
        '_CHOOSING = ("path", "columns", "ignore", ',
        "tests/test_data.py::test_a_changed_setting_never_reads_an_old_store",
    ),
    Fault(
        "the template for tools is no part of a store's key",
        MIX,
        "for name, file in tokenizer.files.items()}",
        'for name, file in tokenizer.files.items() if "/" not in name}',
        "tests/test_data.py::test_a_changed_setting_never_reads_an_old_store",
    ),
    Fault(
        "a template that writes no tools is believed",
        CHAT,
        "            if rendered == whole:",
        "            if rendered == whole and not tools:",
        "tests/test_tools.py::test_what_a_template_would_leave_out_is_refused",
    ),
    Fault(
        "calls are trained, the answers after them are not",
        CHAT,
        "            yield from self._segments(whole[len(before) : end], turn.train)",
        "            yield from self._segments(whole[len(before) : end], turn.train and turns[number - 1].role != 'tool')",
        "tests/test_tools.py::test_tool_conversations_are_what_transformers_makes_of_them",
    ),
    Fault(
        "arguments are written as a text in JSON",
        TOOLS,
        """        arguments = _parsed(arguments or "{}", f"{call.where}: 'arguments'")""",
        """        arguments = {"arguments": arguments}""",
        "tests/test_tools.py::test_mistrals_template_gives_the_tokens_of_mistrals_own_library",
    ),
    Fault(
        "a result is given to the first call that waits, whatever it says",
        TOOLS,
        "(call.id == id if id else name in",
        "(True if id else name in",
        "tests/test_records.py::test_calls_of_openai",
    ),
    Fault(
        "a special token in an argument's name ends the answer",
        CHAT,
        "{self._escape(key): self._escape(item)",
        "{key: self._escape(item)",
        "tests/test_tools.py::test_nothing_of_a_tool_conversation_becomes_a_special_token",
    ),
    Fault(
        "a chat template's text begins with two spaces behind a special token",
        "accessory/data/tokenizer_models.py",
        "joined=segments[0].joined and start > 0",
        "joined=segments[0].joined and start < 0",
        "tests/test_tools.py::test_mistrals_template_gives_the_tokens_of_mistrals_own_library",
    ),
    Fault(
        "the cache has a compressed file for the one that it holds",
        "accessory/data/sources.py",
        'file_kind(file) + (file.suffix if file.suffix in COMPRESSED else "")',
        "file_kind(file)",
        "tests/test_data.py::test_a_compressed_file_under_another_name_is_not_what_the_cache_has",
    ),
)
