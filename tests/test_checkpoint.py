"""Converted directories: one written by hand loads everywhere, what is saved is what was loaded, faults are told."""

import functools
import itertools
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from models import TINY, Tensors, build, evaluate, mesh_for, weights
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from accessory.certify import formats, harness, reference
from accessory.checkpoint.open import Checkpoint
from accessory.errors import UserError
from accessory.model.build import RandomWeights
from accessory.model.logical import LogicalModel
from accessory.parallel.mesh import make_mesh
from accessory.train.save import save_model

LAYOUTS = ("mixtral", "mixtral_sparse")
SUFFIXES = ("pth", "safetensors")
SIZES = (1, 2, 4)
TOKENS = [5, 9, 0, 63, 17, 2, 8, 30]


@functools.cache
def plain():
    return weights(dtype=torch.float32)


def rank_file(w, layout, rank, size, args=TINY):
    """What belongs into one rank's file, by the format's description alone."""
    return formats.rank_tensors(w, args, layout, rank, size)


def write_directory(directory, w, layout, size, suffix):
    directory.mkdir(parents=True)
    for rank in range(size):
        tensors = rank_file(w, layout, rank, size)
        path = directory / f"consolidated.{rank:02d}-of-{size:02d}.model.{suffix}"
        if suffix == "pth":
            torch.save({"model": tensors}, path)
        else:
            save_file(tensors, path)
    (directory / "config.json").write_text(json.dumps(asdict(TINY)))
    (directory / "meta.json").write_text(json.dumps({"llama_type": layout}))
    return directory


def read_file(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)["model"]


def wrong(model, w):
    """Names of this rank's parameters that are not, bit for bit, their part of ``w``."""
    parts = harness.weights(model).items()
    return [name for name, (region, tensor) in parts if not torch.equal(tensor.view(w[name][region].shape), w[name][region])]


def load_everywhere(home):
    """Load each directory of ``home`` into each layout and size that four ranks can form."""
    results = {}
    for size in SIZES:
        mesh = make_mesh(size)
        for directory in sorted(home.iterdir()):
            for layout in LAYOUTS:
                source = Checkpoint(directory)
                model = build(source.args, layout, source, mesh=mesh, dtype=torch.float32)
                results[directory.name, layout, size] = wrong(model, plain()), evaluate(model, TOKENS)
    return results


BIG = replace(TINY, vocab_size=40000, n_layers=1)  # its embedding is drawn in more than one block


def fill_with_random_weights(seed):
    """What differs between partitions, and the whole tensors."""
    logical = LogicalModel(BIG)
    source = RandomWeights(logical, seed)
    whole = {name: source.read(name, logical.whole(name)) for name in logical.shapes}
    differences = []
    for size in SIZES:
        mesh = make_mesh(size)
        for layout in LAYOUTS:
            differences += wrong(build(BIG, layout, source, mesh=mesh, dtype=torch.float32), whole)
    return differences, whole


def held(name, tensor, dtype):
    """A tensor as a model in ``dtype`` has it: the router is never rounded."""
    return tensor if ".gate." in name else tensor.to(dtype)


def save_and_load(home, sizes):
    """Save in every layout, size and format, and load again into both layouts."""
    home.mkdir(exist_ok=True)
    (home.parent / "tokenizer.model").write_bytes(b"some tokenizer")
    results = {}
    for size, layout, mode in itertools.product(sizes, LAYOUTS, ("fsdp", "ddp")):
        dtype = torch.float32 if mode == "fsdp" else torch.bfloat16
        mesh = mesh_for(size, mode)
        model = build(TINY, layout, Tensors(plain()), mesh=mesh, mode=mode, dtype=torch.float32)
        for suffix in SUFFIXES:
            directory = home / f"{layout}-{size}-{mode}-{suffix}"
            save_model(model, directory, {"tokenizer.model": home.parent / "tokenizer.model"}, dtype, suffix)
            for other in LAYOUTS:
                source = Checkpoint(directory)
                assert source.args == TINY and source.layout.name == layout
                again = build(source.args, other, source, mesh=mesh, dtype=dtype)
                results[directory.name, other] = wrong(again, {name: held(name, t, dtype) for name, t in plain().items()})
    return results


def save_loaded(home):
    """first (written by hand) -> second -> third"""
    mesh = make_mesh(2)
    for before, after in (("first", "second"), ("second", "third")):
        for directory in sorted((home / before).iterdir()):
            source = Checkpoint(directory)
            model = build(source.args, source.layout.name, source, mesh=mesh, dtype=torch.float32)
            for _ in range(2):  # the second time over what is there
                save_model(model, home / after / directory.name, {}, torch.float32, directory.name.split("-")[1])


def save_after_validation(home):
    """Save masters in fp32 from a model that computes in bf16 and has just run without gradient, as validation does."""
    for size, mode in ((1, "fsdp"), (1, "sdp"), (1, "ddp"), (2, "fsdp")):
        mesh = mesh_for(size, mode)
        model = build(TINY, "mixtral", Tensors(plain()), mesh=mesh, mode=mode, dtype=torch.float32, compute=torch.bfloat16)
        evaluate(model, TOKENS)
        save_model(model, home / f"{size}-{mode}", {}, torch.float32, "safetensors")


def run_two(home):
    save_loaded(home / "chain")
    save_after_validation(home / "validated")
    return save_and_load(home / "saved", (1, 2))


def run_four(home):
    loaded, random = load_everywhere(home / "by hand"), fill_with_random_weights(3)
    return loaded, random, save_and_load(home / "saved", (2,))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder, and what two ranks returned."""
    home = tmp_path_factory.mktemp("two")
    for layout, suffix in itertools.product(LAYOUTS, SUFFIXES):
        write_directory(home / "chain" / "first" / f"{layout}-{suffix}", plain(), layout, 2, suffix)
    return home, run_ranks(2, run_two, home)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    home = tmp_path_factory.mktemp("four")
    for layout, size, suffix in itertools.product(LAYOUTS, SIZES, SUFFIXES):
        if size == 2 or suffix == "pth":
            write_directory(home / "by hand" / f"{layout}-{size}-{suffix}", plain(), layout, size, suffix)
    return home, run_ranks(4, run_four, home)


def test_a_directory_written_by_hand_loads_into_every_partition(four):
    w = {name: tensor.double() for name, tensor in plain().items()}
    expected = reference.forward(w, TINY, torch.tensor(TOKENS))[0]
    for loaded, _, _ in four[1]:
        assert len(loaded) == 8 * len(LAYOUTS) * len(SIZES)
        for key, (names, logits) in loaded.items():
            assert not names, key
            error = (logits - expected).abs().max() / expected.abs().max()
            assert error <= 1e-5, key


def test_random_weights_do_not_depend_on_the_partition(four):
    ranks = [random for _, random, _ in four[1]]
    whole = ranks[0][1]
    for differences, tensors in ranks:
        assert not differences
        assert all(torch.equal(tensors[name], tensor) for name, tensor in whole.items())
    matrices = {name: tensor for name, tensor in whole.items() if tensor.dim() > 1}
    assert all((tensor == 1).all() for name, tensor in whole.items() if name not in matrices)
    blocks = [block for tensor in matrices.values() for block in (tensor if tensor.dim() == 3 else [tensor])]
    blocks += [matrices["output.weight"][2**15 :]]  # the second of its blocks
    assert len({tuple(block.flatten()[:4].tolist()) for block in blocks}) == len(blocks), "some matrices begin alike"
    for block in blocks:
        noise = 1 / block.numel() ** 0.5
        assert abs(block.mean()) < 5 * 0.02 * noise and block.std().item() == pytest.approx(0.02, rel=5 * noise)
    gate = "layers.0.feed_forward.gate.weight"
    other = RandomWeights(LogicalModel(BIG), 4).read(gate, LogicalModel(BIG).whole(gate))
    assert not torch.equal(other, whole[gate])


@pytest.mark.parametrize("world", ["two", "four"])
def test_saved_directories_are_those_of_the_format(world, request):
    home, ranks = request.getfixturevalue(world)
    saved = sorted((home / "saved").iterdir())
    for rank in ranks:
        results = rank if world == "two" else rank[2]
        assert len(results) == 2 * len(saved) and not any(results.values()), results
    for directory in saved:
        layout, size, mode, suffix = directory.name.split("-")
        files = [f"consolidated.{rank:02d}-of-{int(size):02d}.model.{suffix}" for rank in range(int(size))]
        assert {path.name for path in directory.iterdir()} == {*files, "config.json", "meta.json", "tokenizer.model"}
        assert (directory / "tokenizer.model").read_bytes() == b"some tokenizer"
        assert json.loads((directory / "meta.json").read_text())["llama_type"] == layout
        for rank, name in enumerate(files):
            ours, expected = read_file(directory / name), rank_file(plain(), layout, rank, int(size))
            assert ours.keys() == expected.keys()
            for key, tensor in expected.items():
                tensor = held(key, tensor, torch.float32 if mode == "fsdp" else torch.bfloat16)
                assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), f"{directory.name}: {key}"


def test_load_then_save_gives_the_same_bytes(two):
    chain = two[0] / "chain"
    files = [path.relative_to(chain / "second") for path in (chain / "second").rglob("*") if path.is_file()]
    assert len(files) == 4 * 4
    for file in files:
        assert (chain / "second" / file).read_bytes() == (chain / "third" / file).read_bytes(), file
        if file.name.startswith("consolidated"):
            first, second = read_file(chain / "first" / file), read_file(chain / "second" / file)
            assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), file


@pytest.mark.parametrize("partition", ["1-fsdp", "1-sdp", "1-ddp", "2-fsdp"])
def test_masters_are_saved_whole_after_a_forward_in_bf16(partition, two):
    size = int(partition[0])
    for rank in range(size):
        ours = read_file(two[0] / "validated" / partition / f"consolidated.{rank:02d}-of-{size:02d}.model.safetensors")
        expected = rank_file(plain(), "mixtral", rank, size)
        rounded = [key for key, tensor in expected.items() if not torch.equal(ours[key], tensor)]
        assert not rounded, f"{len(rounded)} tensors were rounded, {rounded[0]} for one"


@pytest.fixture(params=[(layout, suffix) for layout in LAYOUTS for suffix in SUFFIXES], ids="-".join)
def sound(request, tmp_path):
    """A sound directory of two ranks, and its second file."""
    layout, suffix = request.param
    directory = write_directory(tmp_path / "sound", plain(), layout, 2, suffix)
    assert Checkpoint(directory).args == TINY
    return directory, directory / f"consolidated.01-of-02.model.{suffix}"


def refusal(directory):
    """The message of the UserError, which must be one line."""
    with pytest.raises(UserError) as error:
        Checkpoint(directory)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    return message


def rewrite(path, change):
    tensors = read_file(path)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(tensors)
    path.unlink()
    if path.suffix == ".pth":
        torch.save({"model": tensors}, path)
    else:
        save_file(tensors, path)


def test_a_missing_rank_file(sound):
    directory, file = sound
    file.unlink()
    message = refusal(directory)
    assert str(file) in message and "no such file" in message


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 1.0])
def test_a_truncated_file(sound, share):
    directory, file = sound
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share) - (share == 1)])
    message = refusal(directory)
    assert str(file) in message and "damaged" in message


def test_a_config_of_another_shape(sound):
    directory, _ = sound
    (directory / "config.json").write_text(json.dumps(asdict(replace(TINY, hidden_dim=48))))
    message = refusal(directory)
    assert "config.json: hidden_dim is 48, but by " in message and " it is 24: " in message


def test_a_tensor_of_another_shape(sound):
    directory, file = sound
    rewrite(file, lambda tensors: tensors.update({"llma.norm.weight": torch.ones(31)}))
    message = refusal(directory)
    assert str(file) in message and "llma.norm.weight" in message and "[31]" in message and "32" in message


def test_a_missing_tensor(sound):
    directory, file = sound
    rewrite(file, lambda tensors: tensors.pop("llma.layers.1.attention.wo.weight"))
    message = refusal(directory)
    assert str(file) in message and "lacks llma.layers.1.attention.wo.weight" in message


def test_an_unexpected_tensor(sound):
    directory, file = sound
    rewrite(file, lambda tensors: tensors.update({"llma.layers.9.lora_a": torch.ones(2, 2)}))
    message = refusal(directory)
    assert str(file) in message and "unexpected llma.layers.9.lora_a" in message


def test_a_config_with_more_layers(sound):
    directory, _ = sound
    (directory / "config.json").write_text(json.dumps(asdict(replace(TINY, n_layers=3))))
    assert "n_layers is 3, but by" in refusal(directory)


def test_an_unknown_key_in_the_config(sound):
    directory, _ = sound
    for change, near in (({"hiden_dim": 24}, "hidden_dim"), ({"moe": {"num_expert": 8}}, "moe.num_experts")):
        (directory / "config.json").write_text(json.dumps(asdict(TINY) | change))
        message = refusal(directory)
        assert str(directory / "config.json") in message and f"did you mean '{near}'" in message


def test_a_config_that_is_no_json(sound):
    directory, _ = sound
    (directory / "config.json").write_text('{"dim": 32,')
    message = refusal(directory)
    assert str(directory / "config.json") in message and "not valid JSON" in message


@pytest.mark.parametrize("content", [None, "{}"])
def test_the_layout_is_recognised_if_no_file_names_it(sound, content):
    directory, _ = sound
    layout = json.loads((directory / "meta.json").read_text())["llama_type"]
    (directory / "meta.json").unlink()
    if content:
        (directory / "meta.json").write_text(content)
    assert Checkpoint(directory).layout.name == layout


def test_an_unknown_layout(sound):
    directory, _ = sound
    (directory / "meta.json").write_text('{"llama_type": "mixtral_spars"}')
    assert "did you mean 'mixtral_sparse'" in refusal(directory)


def test_files_of_two_checkpoints(sound):
    directory, file = sound
    shutil.copy(file, directory / f"consolidated.00-of-04.model{file.suffix}")
    message = refusal(directory)
    assert "of-02" in message and "of-04" in message


def test_no_files_and_no_directory(tmp_path):
    assert "no such directory" in refusal(tmp_path / "none")
    assert "no checkpoint in it" in refusal(tmp_path)


class Creates:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("place", ["beside the tensors", "instead of the file", "instead of the tensors"])
def test_a_pickle_that_wants_to_run_code(place, tmp_path):
    directory = write_directory(tmp_path / "checkpoint", plain(), "mixtral", 1, "pth")
    file, trap = directory / "consolidated.00-of-01.model.pth", Creates(tmp_path / "ran")
    tensors = read_file(file)
    torch.save(
        {
            "beside the tensors": {"model": dict(tensors), "extra": trap},
            "instead of the file": trap,
            "instead of the tensors": {"model": trap},
        }[place],
        tmp_path / "bad",
    )
    file.unlink()
    (tmp_path / "bad").rename(file)
    message = refusal(directory)
    assert str(file) in message and "refused" in message
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)  # the trap is sharp
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [{"weights": {}}, {"model": "text"}, [], {"model": {}}, "values"],
    ids=["key", "text", "list", "none", "values"],
)
def test_a_pth_that_holds_something_else(content, tmp_path):
    directory = write_directory(tmp_path / "checkpoint", plain(), "mixtral", 1, "pth")
    file = directory / "consolidated.00-of-01.model.pth"
    if content == "values":
        content = {"model": dict.fromkeys(read_file(file), 1.0)}
    file.unlink()
    torch.save(content, file)
    assert str(file) in refusal(directory)
