"""Which label a document has, where it is read off, and what of a classifier is trained and kept."""

from faults.fault import Fault

OBJECTIVE, RECORDS = "accessory/train/objective.py", "accessory/data/records.py"
TESTS = "tests/test_classify.py"
ONE = "certify --only learns=labels world=1"
SPREAD = "certify --only learns=labels world=2 mp=1"
LEARNS = f"{TESTS}::test_a_run_learns_and_says_how_well"
SAMPLES = f"{TESTS}::test_samples_have_their_labels"
ADAPTED = f"{TESTS}::test_an_adapter_keeps_the_score"
F1 = f"{TESTS}::test_f1_counts_only_labels_that_occur"

FAULTS = (
    Fault(
        "a document is classified by its first token",
        "accessory/model/documents.py",
        "return self.borders[1 : self.count + 1] - 1",
        "return self.borders[: self.count]",
        ONE,
    ),
    Fault(
        "labels: each micro-batch is a mean",
        OBJECTIVE,
        'F.cross_entropy(logits, batch.labels, reduction="sum")',
        'F.cross_entropy(logits, batch.labels, reduction="mean")',
        ONE,
    ),
    Fault(
        "labels: the loss is divided by the tokens",
        OBJECTIVE,
        "return batch.documents.count",
        "return batch.real_tokens",
        SPREAD,
    ),
    Fault(
        "documents have one another's labels",
        "accessory/data/loader.py",
        "labels = torch.tensor([-1 if sample.label is None else sample.label for sample in samples]",
        "labels = torch.tensor([-1 if sample.label is None else sample.label for sample in samples[::-1]]",
        SPREAD,
    ),
    Fault(
        "what was said is not what is counted",
        OBJECTIVE,
        "pairs = batch.labels, logits.argmax(1)",
        "pairs = batch.labels, logits.argmin(1)",
        LEARNS,
    ),
    Fault(
        "macro F1 is a mean of recalls",
        OBJECTIVE,
        "2 * right[met] / (there + said)[met]",
        "right[met] / there[met].clamp(min=1)",
        F1,
    ),
    Fault(
        "a label that never occurs has an F1",
        OBJECTIVE,
        "met = there + said > 0",
        "met = said >= 0",
        F1,
    ),
    Fault(
        "the numbers of labels count from 1",
        RECORDS,
        "return int(said)",
        "return int(said) - 1",
        SAMPLES,
    ),
    Fault(
        "samples are found in the cache whatever the order of the labels",
        "accessory/data/mix.py",
        '"labels": labels}',
        '"labels": sorted(labels)}',
        SAMPLES,
    ),
    Fault(
        "what is classified ends as what is learnt",
        "accessory/data/templates.py",
        "if document.label is None:",
        "if document.text:",
        SAMPLES,
    ),
    Fault(
        "beside adapters the score stays as it began",
        "accessory/tuning/spec.py",
        "chosen |= {SCORE} & set(names)",
        "chosen |= {SCORE} & chosen",
        ADAPTED,
    ),
    Fault(
        "a run that goes on begins with a new score",
        "accessory/train/model.py",
        "Overlaid(source, checkpoint, checkpoint.logical.shapes)",
        "Overlaid(source, checkpoint, checkpoint.logical.shapes.keys() - {'score.weight'})",
        ADAPTED,
    ),
    Fault(
        "labels are taken in the order of the file",
        "accessory/checkpoint/huggingface.py",
        "return [names[str(number)] for number in range(len(names))]",
        "return [*names.values()]",
        f"{TESTS}::test_unnamed_labels_and_other_problems",
    ),
    Fault(
        "the padding is what ends a text",
        "accessory/checkpoint/huggingface.py",
        "padding if padding not in (None, ends) else int(ends == 0)",
        "ends",
        f"{TESTS}::test_transformers_says_the_same_of_texts",
    ),
)
