"""Which experts a token goes to, how much each counts, and what is counted of it."""

from faults.checks import ONE
from faults.fault import Fault

FILE = "accessory/model/moe/router.py"
FORMULAS = "tests/test_balance.py::test_formulas_are_those_of_the_papers"
BIAS = "tests/test_balance.py::test_every_partition_equals_the_plain_process[bias]"

FAULTS = (
    Fault(
        "a second softmax, over the chosen experts' probabilities",
        FILE,
        "weights = probs.gather(-1, experts)",
        "weights = probs.gather(-1, experts).softmax(-1)",
        ONE,
    ),
    Fault(
        "the weights are not renormalised",
        FILE,
        "Routing(logits, probs, weights / weights.sum(-1, keepdim=True), experts)",
        "Routing(logits, probs, weights, experts)",
        ONE,
    ),
    Fault(
        "the weights carry no gradient to the router",
        FILE,
        "weights = probs.gather(-1, experts)",
        "weights = probs.detach().gather(-1, experts)",
        ONE,
    ),
    Fault(
        "the score bias is part of the weights",
        FILE,
        "weights = probs.gather(-1, experts)",
        "weights = scores.gather(-1, experts)",
        "tests/test_balance.py::test_the_bias_decides_in_every_layout_and_size",
    ),
    Fault(
        "the score bias is moved the wrong way",
        FILE,
        "torch.sign(counts.sum() - len(counts) * counts)",
        "torch.sign(len(counts) * counts - counts.sum())",
        "tests/test_balance.py::test_the_bias_evens_the_load_out",
    ),
    Fault(
        "the score bias is moved by its own rank's counts",
        "accessory/train/balance.py",
        "shift_score_biases(model, model.mesh.dp.all_reduce(counts.clone()), self.bias_rate)",
        "shift_score_biases(model, counts, self.bias_rate)",
        BIAS,
    ),
    Fault(
        "the documents' statistics are pooled",
        "accessory/model/moe/router.py",
        "index_add(1, documents.document_of, values)",
        "index_add(1, documents.document_of.clamp(max=1), values)",
        "tests/test_balance.py::test_formulas_are_those_of_the_papers",
    ),
    Fault(
        "only the first choice is counted",
        FILE,
        "scatter_(2, experts, 1.0)",
        "scatter_(2, experts[..., :1], 1.0)",
        FORMULAS,
    ),
    Fault(
        "the z-loss is not squared",
        FILE,
        "logits.logsumexp(-1, keepdim=True).square()",
        "logits.logsumexp(-1, keepdim=True).abs()",
        FORMULAS,
    ),
    Fault(
        "entropy is in bits",
        FILE,
        "torch.special.entr(probs.detach()).sum(-1, keepdim=True)",
        "torch.special.entr(probs.detach()).sum(-1, keepdim=True) * 1.4426950408889634",
        "tests/test_health.py::test_figures_equal_one_plain_process[1]",
    ),
)
