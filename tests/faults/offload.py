"""Experts that lie elsewhere: which are on the device, whether they came, and what an expert's gradients are added to."""

from faults.fault import Fault

SLOTS, EXPERTS, RECORDS, GUESS, PLAN, LANE = (
    f"accessory/model/moe/offload/{name}.py" for name in ("slots", "experts", "records", "guess", "plan", "lane")
)
TESTS = "tests/test_offload.py::test_"
PROPERTY = f"{TESTS}slots_never_serve_a_stale_expert_nor_give_up_one_in_use"
ROOM = f"{TESTS}the_least_recent_or_the_least_frequent_makes_room"
DISK = f"{TESTS}a_disk_holds_them_and_what_is_wrong_with_it_is_said"
LOADS = f"{TESTS}what_a_run_used_most_is_there_first"
FITS = f"{TESTS}what_is_said_to_fit_does"
ORDER = f"{TESTS}on_a_gpu_a_copy_waits_for_what_reads_its_slot_and_products_for_the_copy"
CERTIFY = "certify --quick --only slots=3 layout=mixtral_sparse"

FAULTS = (
    Fault(
        "an expert is used before it has come",
        EXPERTS,
        "self.waited_s += load.wait()",
        "self.waited_s += 0.0",
        f"{TESTS}no_expert_is_used_before_it_has_come",
    ),
    Fault("an expert in use makes room", SLOTS, "kept = self._held | set(experts)", "kept = set(experts)", ROOM),
    Fault(
        "the next expert is brought where there is no slot beside this one's",
        SLOTS,
        " and slots.has_room:",
        ":",
        PROPERTY,
    ),
    Fault(
        "an expert makes room before the batch has used it",
        SLOTS,
        "slots.hold(order[: len(order) - len(absent)])",
        "slots.hold([])",
        PROPERTY,
    ),
    Fault("the expert that was used last makes room", SLOTS, "return order[0]", "return order[-1]", ROOM),
    Fault("how often an expert is used is not counted", SLOTS, "self._uses.get(expert, 0) + 1", "1", ROOM),
    Fault(
        "a use of long ago counts as much as one of now",
        SLOTS,
        "expert: FADES * uses for",
        "expert: uses for",
        f"{TESTS}what_was_used_often_long_ago_makes_room",
    ),
    Fault(
        "a layer's guesses are brought though they are mostly wrong",
        SLOTS,
        "if self.tally.right + TRUST < WORTH_BRINGING * (self.tally.guessed + TRUST):",
        "if False:",
        f"{TESTS}guesses_that_are_mostly_wrong_bring_nothing_until_they_are_right",
    ),
    Fault(
        "what a guess brought stays as if it had been used",
        SLOTS,
        "for expert in (*early, *(e for e in self.slot_of if e not in early))",
        "for expert in (*(e for e in self.slot_of if e not in early), *early)",
        ROOM,
    ),
    Fault(
        "an expert that failed to come is taken for one that is there",
        EXPERTS,
        "                self.slots.lose(expert)\n                raise",
        "                raise",
        DISK,
    ),
    Fault(
        "an expert that a guess failed to bring fails the next request",
        EXPERTS,
        "        self._forget_failed()\n",
        "",
        DISK,
    ),
    Fault(
        "what a disk gives too little of is taken for an expert",
        RECORDS,
        'raise self._failed(f"it ends {self._nbytes - done} bytes too early")',
        "break",
        DISK,
    ),
    Fault(
        "another expert's bytes are read from the disk",
        RECORDS,
        "expert * self._nbytes + done",
        "max(0, expert - 1) * self._nbytes + done",
        DISK,
    ),
    Fault(
        "a rank's guess counts experts from the first rank's",
        GUESS,
        "expert - self._local.start for",
        "expert for",
        f"{TESTS}each_rank_offloads_its_own[mixtral]",
    ),
    Fault(
        "of an adapter only the last expert's gradient is left",
        EXPERTS,
        "gradient if total is None else total + gradient",
        "gradient",
        CERTIFY,
    ),
    Fault(
        "an expert's rows begin where all rows do",
        EXPERTS,
        "(ends_e - where.start).clamp(",
        "ends_e.clamp(",
        f"{TESTS}answers_are_those_of_a_model_that_has_all_its_experts[mixtral-fp32]",
    ),
    Fault(
        "experts come once more where a block is recomputed",
        EXPERTS,
        "        ctx.experts, ctx.compute, ctx.trained",
        "        ctx.save_for_backward(x_nD)\n        ctx.experts, ctx.compute, ctx.trained",
        f"{TESTS}training_brings_each_expert_twice_and_stays_within_the_memory[block]",
    ),
    Fault(
        "what was used least elsewhere is there first",
        SLOTS,
        "self._uses[expert])[-self.count :]",
        "-self._uses[expert])[-self.count :]",
        LOADS,
    ),
    Fault(
        "a rank's loads are counted from the first rank's",
        PLAN,
        "of_layer[local.start : local.stop]",
        "of_layer[: len(local)]",
        LOADS,
    ),
    Fault(
        "a copy does not wait for what still reads its slot",
        LANE,
        "                    stream.wait_event(self._before)\n",
        "                    pass\n",
        ORDER,
    ),
    Fault(
        "a product does not wait on the device for its expert's copy",
        LANE,
        ".wait_event(self._copied)",
        "",
        ORDER,
    ),
    Fault(
        "what is locked for a GPU is never let go",
        RECORDS,
        "    weakref.finalize(owner, unpin)\n",
        "",
        f"{TESTS}what_a_gpu_copies_from_is_locked_to_the_byte_and_let_go",
    ),
    Fault(
        "what a step makes is not reckoned with",
        "accessory/model/answering.py",
        '"step": 2 * CHUNK',
        '"step": 0 * CHUNK',
        f"{TESTS}an_answer_stays_within_the_memory",
    ),
    Fault(
        "the keys and values of an answer are not reckoned with",
        "accessory/model/answering.py",
        "(in_pages(max_seq_len) + GPU_PAGE) * cache_bytes_of_token(args, size, dtype)",
        "0.0",
        FITS,
    ),
    Fault(
        "experts that train are offloaded",
        PLAN,
        "if trained := sorted(",
        "if False and (trained := sorted(",
        f"{TESTS}what_is_refused",
        more=((PLAN, "& set(trains)):", "& set(trains))):"),),
    ),
)
