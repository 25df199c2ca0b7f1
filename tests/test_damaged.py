"""A checkpoint with values that are no numbers: it is told, by name, before anything is made of it."""

import json
import math
import shutil

import pytest
from jobs import command
from safetensors.torch import load_file, save_file
from slips import make_home

UNUSED = 303  # of the vocabulary, beyond the tokenizer's pieces
FILE, KEY = "consolidated.00-of-01.model.safetensors", "llma.tok_embeddings.weight"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model with one infinite value that no text meets, and one that nothing survives."""
    home = make_home(tmp_path_factory.mktemp("damaged"))
    for name, key, row, value in (("one", KEY, UNUSED, math.inf), ("all", "llma.norm.weight", 0, math.nan)):
        shutil.copytree(home / "ckpt", home / name)
        tensors = load_file(home / name / FILE)
        tensors[key][row] = value
        save_file(tensors, home / name / FILE)
    return home


def trains(home, checkpoint, *words, ranks=1):
    settings = [f"model.checkpoint={home / checkpoint}", "model.config=null", "model.tokenizer=null"]
    return command("finetune", home / "run.yaml", *settings, f"out={home}/{checkpoint}run", *words, ranks=ranks)


def test_inspect_names_the_file_and_the_tensor(home):
    codes, out, err = command("inspect", home / "one")
    assert codes == [1] and f"{home / 'one' / FILE}: {KEY} holds NaN or infinite values" in out
    assert "error: 1 tensors hold NaN or infinite values" in err
    assert command("inspect", home / "ckpt")[0] == [0]


def test_generation_tells_it(home):
    codes, _, err = command("generate", home / "one", "the list", "--max-gen-len", 2, "--precision", "fp32", ranks=2)
    assert codes == [0, 0] and err.count("warning: tok_embeddings.weight hold NaN or infinite values") == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_refuses_to_start_unless_it_is_told_to(home, ranks):
    codes, out, err = trains(home, "one", f"parallel.model_parallel={ranks}", ranks=ranks)
    assert codes == [1] * ranks and "step" not in out and not (home / "onerun").exists()
    assert "model.checkpoint: tok_embeddings.weight hold NaN or infinite values" in err and "model.strict=false" in err
    codes, out, err = trains(home, "one", f"parallel.model_parallel={ranks}", "model.strict=false", ranks=ranks)
    assert codes == [0] * ranks and "warning: tok_embeddings.weight hold NaN or infinite values" in err
    shutil.rmtree(home / "onerun")


def test_a_validation_loss_that_is_no_number(home):
    codes, out, _ = trains(home, "all", "model.strict=false")
    assert codes == [1] and "validation loss nan  perplexity nan" in out
    row = json.loads((home / "allrun/metrics.jsonl").read_text().splitlines()[0])
    assert math.isnan(row["val_loss"]) and math.isnan(row["val_perplexity"])
