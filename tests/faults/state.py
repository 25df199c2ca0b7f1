"""Going on where a run was stopped."""

from faults.fault import Fault

FILE, LOOP, MODEL = "accessory/train/state.py", "accessory/train/loop.py", "accessory/train/model.py"
SAVER, SAVE = "accessory/train/saver.py", "accessory/train/save.py"
RANGES = "tests/test_saves.py::test_every_rank_writes_its_own_bytes"
STATES = "accessory/checkpoint/state.py"
STEPS = "tests/test_run_state.py::test_steps_go_on_as_if_there_had_been_no_state"
HF = "tests/test_saves.py::test_hugging_face_files_are_those_of_convert"
BEST = "tests/test_saves.py::test_the_best_model_stays_when_a_run_goes_on"
KEPT = "tests/test_state.py::test_states_at_multiples_stay"
FALLS_BACK = "tests/test_state.py::test_a_run_goes_on_from_the_newest_whole_state"
RESUMED = "'tests/test_resume.py::test_a_killed_run_goes_on_in_another_partition[before0-after0]'"

FAULTS = (
    Fault(
        "the second moment is read from the first",
        FILE,
        "state.read_kind(kind, name, box)",
        'state.read_kind("exp_avg", name, box)',
        STEPS,
    ),
    Fault("moments begin at zero", FILE, "local[rows] = state.read_kind(", "_ = state.read_kind(", STEPS),
    Fault("AdamW counts its steps anew", FILE, "torch.tensor(float(state.notes.steps)", "torch.tensor(float(0)", STEPS),
    Fault(
        "AdamW's steps are counted in rows",
        FILE,
        "torch.tensor(float(state.notes.steps)",
        "torch.tensor(float(state.notes.rows)",
        STEPS,
    ),
    Fault(
        "weights are the start's, not the state's", MODEL, "source = Overlaid(source, state, state.names)", "pass", RESUMED
    ),
    Fault(
        "the rows seen are steps times the batch",
        LOOP,
        "rows=done.rows,",
        "rows=done.steps * self.batches.global_batch,",
        "tests/test_run_state.py::test_the_rows_that_were_seen",
    ),
    Fault(
        "what is saved is rounded to bf16",
        FILE,
        "(box, local_part(value)[rows])",
        "(box, local_part(value)[rows].bfloat16())",
        STEPS,
    ),
    Fault(
        "the score biases are not restored",
        MODEL,
        "Overlaid(source, state, state.names)",
        "Overlaid(source, state, {name for name in state.names if not is_buffer(name)})",
        "tests/test_balance.py::test_a_run_resumes_with_its_bias",
    ),
    Fault(
        "Hugging Face's files hold one rank's slice",
        SAVE,
        "gathered_whole(model, dtype=dtype) if hf",
        "gathered(model, dtype=dtype) if hf",
        HF,
    ),
    Fault("the last model is the best", LOOP, "step > 0 and loss < self.lowest", "step > 0 and loss < math.inf", BEST),
    Fault(
        "a run that goes on has forgotten how good its best was",
        LOOP,
        "lowest_validation(self.out, done.steps)",
        "lowest_validation(self.out, 0)",
        BEST,
    ),
    Fault("wandb begins another run", "accessory/train/loggers.py", "goes_on=done > 0", "goes_on=False", BEST),
    Fault(
        "training changes what is being saved",
        SAVER,
        "return tensor.detach().clone(memory_format=torch.contiguous_format)",
        "return tensor.detach()",
        "tests/test_saves.py::test_training_goes_on_while_a_state_is_written",
    ),
    Fault(
        "every rank holds and writes all of a saved tensor",
        SAVE,
        "for rank in (axis.rank, axis.rank + 1)",
        "for rank in (0, axis.size)",
        RANGES,
    ),
    Fault(
        "a rank's range is written at the beginning of the tensor",
        "accessory/checkpoint/storage.py",
        "place.offset + start * place.dtype.itemsize",
        "place.offset",
        "tests/test_checkpoint.py::test_masters_are_saved_whole_after_a_forward_in_bf16",
    ),
    Fault(
        "one rank cannot write, and the others publish what there is",
        SAVER,
        "    for _, text in outcomes:\n        if text:",
        "    for text in (problem,):\n        if text:",
        "tests/test_saves.py::test_what_cannot_be_written_is_told_on_all_ranks_and_leaves_nothing",
    ),
    Fault(
        "a run that fails does not wait for the save that is under way",
        LOOP,
        "            self.saver.settle()\n",
        "",
        "tests/test_saves.py::test_a_fault_behind_a_save_does_not_lose_it",
    ),
    Fault(
        "a plan forgets a moment",
        "accessory/model/memory.py",
        "moments=MOMENTS * masters",
        "moments=masters",
        "tests/test_dry_run.py::test_a_plan_for_other_machines_needs_none_of_them",
    ),
    Fault(
        "a plan forgets one of the two up projections",
        "accessory/model/memory.py",
        "2 * args.hidden_dim / model_parallel",
        "args.hidden_dim / model_parallel",
        "tests/test_dry_run.py::test_what_a_block_keeps_for_backward",
    ),
    Fault(
        "a plan takes a state to be its weights alone",
        "accessory/train/dry_run.py",
        "state=len(KINDS) * state",
        "state=state",
        "tests/test_dry_run.py::test_what_is_planned_is_what_happens",
    ),
    Fault(
        "doctor: a rank looks only at the file that it wrote itself",
        "accessory/train/doctor.py",
        "(missing := [name for name in names if not",
        "(missing := [name for name in names[self.launch.rank :][:1] if not",
        "'tests/test_doctor.py::test_what_is_wrong_is_said_in_its_line[files]'",
    ),
    Fault(
        "doctor: the sum that is expected is any",
        "accessory/train/doctor.py",
        "(data == world * (world + 1) / 2).all()",
        "data.isfinite().all()",
        "'tests/test_doctor.py::test_what_is_wrong_is_said_in_its_line[gloo]'",
    ),
    Fault("the oldest states are kept", STATES, "[:-keep]", "[keep:]", RESUMED),
    Fault("a state that is kept for ever goes", STATES, "if not keep_every or int(", "if True or int(", KEPT),
    Fault(
        "a damaged state is gone on from", FILE, 'problems = [""] * dist', 'problem, problems = "", [""] * dist', FALLS_BACK
    ),
    Fault(
        "a damaged state keeps its name, and outlives those that are saved on the way to its step",
        FILE,
        "        state.rename(aside)\n",
        "        pass\n",
        FALLS_BACK,
    ),
    Fault(
        "one rank's part is damaged, and the others do not hear of it",
        FILE,
        "dist.all_gather_object(problems, problem)",
        "problems[0] = problem",
        FALLS_BACK,
    ),
    Fault(
        "a directory gets its name before its files are on the disk",
        "accessory/checkpoint/publish.py",
        '(*temporary.rglob("*"), temporary)',
        "(temporary,)",
        "tests/test_state.py::test_a_directory_is_on_the_disk_before_it_has_its_name",
    ),
    Fault(
        "a run with other settings begins where models of another are",
        "accessory/train/state.py",
        "    if others:\n",
        "    if not others:\n",
        "tests/test_resume.py::test_the_models_of_another_run_are_not_written_over",
    ),
)
