"""What a model is measured by: scores of tasks, of data, and calls of it in other processes."""

from faults.fault import Fault

SCORING, LM_EVAL, WORKERS = "accessory/infer/scoring.py", "accessory/infer/lm_eval.py", "accessory/infer/workers.py"
SCORES = "'tests/test_evaluate.py::test_scores_are_those_of_lm_evals_own_model[1]'"

FAULTS = (
    Fault(
        "the last token of a continuation is seen as it is scored",
        SCORING,
        "(*context, *continuation[:-1])",
        "(*context, *continuation)[1:]",
        SCORES,
    ),
    Fault(
        "of answers that are run at once, each gets the first one's score",
        SCORING,
        "continuation = asked[number][1]",
        "continuation = asked[documents[document][0]][1]",
        SCORES,
    ),
    Fault("an answer of which one token is the likeliest is greedy", SCORING, "likeliest.all()", "likeliest.any()", SCORES),
    Fault(
        "a text that is too long loses its end",
        LM_EVAL,
        "context[-(self.max_length + 1 - len(continuation)) :]",
        "context[: self.max_length + 1 - len(continuation)]",
        SCORES,
    ),
    Fault(
        "a prompt that is too long loses its end",
        LM_EVAL,
        "ids[-(self.max_length - sampling.max_tokens) :]",
        "ids[: self.max_length - sampling.max_tokens]",
        SCORES,
    ),
    Fault(
        "a task's stops are not heeded",
        LM_EVAL,
        '"stop": [until] if isinstance(until, str) else until',
        '"stop": []',
        SCORES,
    ),
    Fault(
        "the template's special tokens are read as text",
        LM_EVAL,
        "if string in self._asked:",
        "if string in ():",
        SCORES,
    ),
    Fault(
        "token accuracy is the share of all tokens",
        "accessory/train/objective.py",
        "likeliest.new_tensor(batch.target_tokens)",
        "likeliest.new_tensor(batch.real_tokens)",
        "'tests/test_validate.py::test_the_validation_loss[1-2-None]'",
    ),
    Fault(
        "the answer to a call that was broken off is taken for the next one's",
        WORKERS,
        "if answered != number:",
        "if answered > number:",
        "tests/test_multi_gpu_wrapper.py::test_after_ctrl_c_a_call_gets_its_own_answer",
    ),
)
