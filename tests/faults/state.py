"""Going on where a run was stopped."""

from faults.fault import Fault

FILE, LOOP, MODEL = "accessory/train/state.py", "accessory/train/loop.py", "accessory/train/model.py"
STATES = "accessory/checkpoint/state.py"
STEPS = "tests/test_run_state.py::test_steps_go_on_as_if_there_had_been_no_state"
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
)
