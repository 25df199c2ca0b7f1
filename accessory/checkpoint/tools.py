"""The verbs ``convert``, ``quantise``, ``merge``, ``inspect`` and ``verify`` for checkpoints and training states."""

import argparse
import itertools
import math
import sys
from collections import Counter
from dataclasses import replace

import torch

from accessory.checkpoint.calibrate import Calibrated, calibration_batches
from accessory.checkpoint.convert import Target, convert, export_peft
from accessory.checkpoint.open import Checkpoint
from accessory.checkpoint.quantise import in_words
from accessory.checkpoint.state import KINDS, TrainingState, is_state
from accessory.checkpoint.verify import compare, different_settings, different_training
from accessory.console import progress, say
from accessory.data.tokenizer import Tokenizer, check_vocabulary
from accessory.dtypes import all_finite, get_dtype
from accessory.errors import UserError
from accessory.files import check_directory
from accessory.model.answering import USUAL_TOKENS, WAYS, cache_bytes_of_token, fits_of
from accessory.model.args import ModelArgs
from accessory.model.logical import LogicalModel, allowed_sizes, check_divides
from accessory.model.memory import weight_bytes
from accessory.model.moe.layouts import LAYOUTS
from accessory.settings import QuantiseSection
from accessory.tuning.spec import PRESETS, matches
from accessory.visual.vision import count_of_encoders

ROOM = 0.85
"""Share of a card for the model and its cache; activations and the driver have the rest."""
TITLES = {
    "hf": "Hugging Face",
    "mistral": "Mistral's own",
    "mixtral": "Accessory, expert layout (mixtral)",
    "mixtral_sparse": "Accessory, sparse layout (mixtral_sparse)",
    "adapter": "an adapter of this program",
    "peft": "an adapter of PEFT",
    "visual": "encoders of a model that sees",
}


def run_convert(arguments: argparse.Namespace) -> None:
    _convert(Checkpoint(arguments.sources, arguments.config, strict=not arguments.force), arguments)


def _convert(checkpoint: Checkpoint, arguments: argparse.Namespace) -> None:
    dtype = get_dtype(arguments.dtype) if arguments.dtype else None
    if arguments.to == "peft":
        export_peft(checkpoint, arguments.destination)
    else:
        target = Target(arguments.to, arguments.mp, dtype, arguments.format, arguments.shard_gb * 1e9)
        convert(checkpoint, arguments.destination, target)
    print(f"wrote {arguments.destination}")


def run_quantise(arguments: argparse.Namespace) -> None:
    if not (arguments.experts or arguments.attention):
        raise UserError("nothing is to be quantised: name --experts, --attention or both, as --experts nf4 --attention nf4")
    quantise = QuantiseSection(arguments.experts, arguments.attention)
    checkpoint = Checkpoint(arguments.sources, arguments.config, not arguments.force, quantise)
    if any(adapter.rank for adapter in checkpoint.logical.adapters.values()):
        raise UserError(f"{arguments.sources[-1]}: an adapter goes into numbers: merge it first (accessory merge)")
    target = Target(arguments.to, arguments.mp)
    target.check(checkpoint.args)
    convert(checkpoint, arguments.destination, target, _calibrated(checkpoint, arguments) if arguments.calibrate else None)
    print(f"wrote {arguments.destination}")


def _calibrated(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Calibrated:
    """The parts of the quantised ``checkpoint``, calibrated on a mix from its original."""
    original = Checkpoint(arguments.sources, arguments.config, not arguments.force)
    if original.args.quantise:
        raise UserError(f"{arguments.sources[0]}: is {in_words(original.args.quantise)} already: calibrate its original")
    if original.logical.adapters:
        raise UserError(f"{arguments.sources[0]}: has biases beside its matrices, which --calibrate leaves out of account")
    if arguments.mp > 1:
        raise UserError(
            "--calibrate goes through the layers once, and writes one part: leave --mp away (what is written loads at any "
            "size, and accessory convert cuts it into files)"
        )
    batches = calibration_batches(original, arguments.calibrate, arguments.tokens, arguments.seed)
    return Calibrated(original, checkpoint.logical, batches)


def run_merge(arguments: argparse.Namespace) -> None:
    """Merge an adapter into its base; by default the result is in the base's own format."""
    checkpoint = Checkpoint(arguments.sources, arguments.config, strict=not arguments.force)
    base, adapter = checkpoint.directories
    if checkpoint.base_layers > 1:
        raise UserError(f"{adapter.directory}: no adapter in it; accessory convert lays whole directories over one another")
    arguments.to = arguments.to or base.format
    arguments.mp = arguments.mp or (base.size if arguments.to == base.format else 1)
    _convert(checkpoint, arguments)


def run_inspect(arguments: argparse.Namespace) -> None:
    if len(arguments.paths) == 1 and is_state(arguments.paths[0]):
        _inspect_state(TrainingState(arguments.paths[0]))
        return
    checkpoint = Checkpoint(arguments.paths, arguments.config, strict=False)
    args = checkpoint.args
    stored = [tensor for d in checkpoint.directories for file in d.stored.values() for tensor in file.values()]
    nbytes = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in stored)
    paths = {path for tensor in stored for path in tensor.parts.paths}
    for directory in checkpoint.directories:
        print(f"{directory.directory}: {TITLES[directory.format]}, in {directory.size} model-parallel part(s)")
    print(f"  files       {len(paths)}, {nbytes / 1e9:,.2f} GB")
    print(f"  model       {_shape(args)}")
    if args.labels:
        print(f"  labels      {', '.join(args.labels)}")
    if sees := checkpoint.visual:
        there = "its encoders are there" if checkpoint.encoders else "its encoders are in another directory"
        print(f"  sees        as {sees.preset}: {sees.words} words an image; {there}")
    if checkpoint.tokenizer:
        tokenizer = Tokenizer(checkpoint.tokenizer)
        print(f"  tokenizer   {checkpoint.tokenizer}, {tokenizer.n_words} pieces")
        check_vocabulary(tokenizer, args.vocab_size)
    print(f"  fingerprint {checkpoint.fingerprint}")
    kinds = Counter((a.rank, a.scaling, a.bias) for a in checkpoint.logical.adapters.values())
    for (rank, scaling, bias), count in kinds.items():
        print(f"  adapters    on {count} matrices: rank {rank}, scaling {scaling:g}{', with bias' * bias}")
    for layout in LAYOUTS.values():
        allowed = allowed_sizes(args, layout)
        print(f"  runs as     {layout.name} at model-parallel size {', '.join(map(str, allowed))}")
    _print_table(checkpoint)
    if arguments.fit:
        _print_fit(checkpoint, arguments.fit * 1e9)
    checkpoint.warn_of_differing_replicas()
    damaged = _damaged(checkpoint, nbytes)
    for where in damaged:
        say(f"warning: {where} holds NaN or infinite values")
    if not checkpoint.sound:
        sys.exit("accessory: error: files and config.json do not fit together (see the warnings)")
    if damaged:
        sys.exit(f"accessory: error: {len(damaged)} tensors hold NaN or infinite values (see the warnings)")


def _shape(args: ModelArgs) -> str:
    shape = {k: v for k, v in args.to_dict().items() if k not in ("moe", "labels", "visual")} | args.to_dict()["moe"]
    return ", ".join(f"{key} {value}" for key, value in shape.items() if value is not None)


def _inspect_state(state: TrainingState) -> None:
    notes = state.notes
    print(f"{state.directory}: a training state, to resume from")
    print(
        f"  stands at   step {notes.steps} of {notes.of_steps}, {notes.rows:,} rows of the data, {notes.global_batch} a step"
    )
    print(f"  files       {notes.parts} part(s), {state.nbytes / 1e9:,.2f} GB")
    print(f"  model       {_shape(state.args)}")
    print(f"  base        {f'fingerprint {notes.base}' if notes.base else 'none: all of the model is in here'}")
    for name, value in (notes.settings or {}).items():
        print(f"  {name} {_said(value)}")
    print(f"\n  {'tensors':<12}{'count':>6}  {'numbers':>16}  dtype")
    for kind in KINDS:
        found = [item for keys in state.stored.values() for item in keys.items() if item[0].startswith(f"{kind}/")]
        names = {key.rpartition("/")[0] for key, _ in found}
        dtypes = {str(tensor.dtype).removeprefix("torch.") for _, tensor in found}
        numbers = sum(math.prod(tensor.shape) for _, tensor in found)
        print(f"  {kind:<12}{len(names):>6}  {numbers:>16,}  {', '.join(sorted(dtypes))}")


def _print_table(checkpoint: Checkpoint) -> None:
    """Print the size of each group of tensors, and the precision it is held in."""
    logical, rows = checkpoint.logical, []
    for group in PRESETS:
        own = [name for name in logical.dense if matches(group, name)]
        if not own:
            continue
        held = [name for name in logical.base if matches(group, name)]
        kinds = Counter(
            logical.codecs[name].name if name in logical.codecs else str(checkpoint.dtype(name)).removeprefix("torch.")
            for name in own
        )
        nbytes = sum(math.prod(logical.base[name]) * checkpoint.dtype(name).itemsize for name in held)
        rows.append((group, len(own), sum(logical.sizes[name] for name in held), nbytes, ", ".join(kinds)))
    _, counts, sizes, weights, _ = zip(*rows, strict=True)
    rows.append(("all", sum(counts), sum(sizes), sum(weights), f"{checkpoint.args.active_parameters():,} active per token"))
    print(f"\n  {'tensors':<12}{'count':>6}  {'parameters':>16}  {'bits each':>9}  {'GB':>9}  held as")
    for name, count, size, nbytes, kind in rows:
        print(f"  {name:<12}{count:>6}  {size:>16,}  {8 * nbytes / max(1, size):>9.3f}  {nbytes / 1e9:>9.3f}  {kind}")


def _print_fit(checkpoint: Checkpoint, card: float) -> None:
    """Print which ways to hold the model fit on cards of ``card`` bytes, and how many tokens' keys and values fit beside."""
    args, layout = checkpoint.args, checkpoint.layout
    ways = (args.quantise,) if args.quantise else WAYS
    sizes = [size for size in (1, 2, 4, 8) if size in allowed_sizes(replace(args, quantise=None), layout)]
    print(
        f"\n  on cards of {card / 1e9:g} GB, in bf16: GB of a rank, and the tokens of keys and values that fit beside them"
    )
    print(f"  {'held':<40}" + "".join(f"{f'mp {size}':>22}" for size in sizes))
    for way in ways:
        cells = []
        for size in sizes:
            try:
                logical = LogicalModel(replace(args, quantise=way))
                check_divides(logical.args, layout, size)
            except UserError:  # blocks of quantised matrices cannot be cut evenly
                cells.append("-")
                continue
            share = weight_bytes(logical, layout, size, torch.bfloat16)
            room = int(ROOM * card - share) // cache_bytes_of_token(args, size, torch.bfloat16)
            cells.append(f"{share / 1e9:.2f} " + (f"{room:,}" if room > 0 else "no"))
        print(f"  {in_words(way):<40}" + "".join(f"{cell:>22}" for cell in cells))
    tokens, budget = min(USUAL_TOKENS, args.max_seq_len), ROOM * card
    print(
        f"\n  with --offload device_memory={budget / 1e9:g}GB on one of them: of each layer's experts those on the card, "
        f"beside {tokens:,} tokens of keys and values"
    )
    for fit in fits_of(args, layout, 1, budget, tokens, count_of_encoders(args.visual)):
        print(f"  {in_words(fit.quantise):<42}{fit}")


def _damaged(checkpoint: Checkpoint, nbytes: int) -> list[str]:
    """The tensors with NaN or infinite values. This reads all ``nbytes`` of the tensors."""
    found = []
    with progress(total=nbytes, unit="B", unit_scale=True, desc="reading") as bar:
        files = (tensors for directory in checkpoint.directories for tensors in directory.stored.values())
        for key, stored in itertools.chain.from_iterable(tensors.items() for tensors in files):
            tensor = stored.map()
            if not all_finite(tensor):
                found.append(f"{stored.parts}: {key}")
            bar.update(tensor.nbytes)
    return found


def run_verify(arguments: argparse.Namespace) -> None:
    if arguments.b is None:
        if not is_state(check_directory(arguments.a, "a training state")):
            raise UserError(
                f"{arguments.a}: alone a training state can be verified; name the checkpoint to compare this with"
            )
        _verify_state(TrainingState(arguments.a))
        return
    a, b = Checkpoint(arguments.a), Checkpoint(arguments.b)
    for checkpoint in (a, b):
        checkpoint.warn_of_differing_replicas()
    settings = different_settings(a, b)
    for name, (ours, theirs) in settings.items():
        print(f"{name}: {ours} | {theirs}")
    if settings:
        sys.exit("DIFFERENT: the models' settings are not the same")
    training = different_training(a, b)
    for name, (ours, theirs) in training.items():
        print(f"{name}: {_said(ours)} | {_said(theirs)}")
    if training:
        print("they would train differently, or be asked differently, as these say")
    results = compare(a, b)
    differing = [r for r in results if not (r.exact or r.rounded or r.error <= arguments.tolerance)]
    for r in differing:
        print(f"{r.name}: largest difference {r.difference:.3e}, {r.error:.1e} of the largest value ({_dtypes(r.dtypes)})")
    if differing:
        sys.exit(f"DIFFERENT: {len(differing)} of {len(results)} tensors")
    rounded = [r for r in results if not r.exact and r.rounded]
    within = [r for r in results if not r.exact and not r.rounded]
    how = "bit for bit"
    if within:
        how = f"within {max(r.error for r in within):.1e} of each tensor's largest value"
    elif rounded:
        how = f"bit for bit, once rounded to the narrower dtype ({_dtypes(rounded[0].dtypes)})"
    print(f"the same model: {len(results)} tensors, {how}")


def _verify_state(state: TrainingState) -> None:
    damaged = [place for part in progress(range(state.notes.parts), unit="part") for place in state.damaged(part)]
    for place in damaged:
        print(f"{place} is not what was saved")
    if damaged:
        sys.exit(f"DAMAGED: {len(damaged)} tensors; resume=auto goes on from the newest state that is whole")
    print(
        f"whole: step {state.notes.steps}, {state.notes.parts} part(s), {state.nbytes / 1e9:,.2f} GB, as their checksums say"
    )


def _said(value: object) -> object:
    return "not said" if value is None else value


def _dtypes(pair: tuple[torch.dtype, torch.dtype]) -> str:
    return " | ".join(str(dtype).removeprefix("torch.") for dtype in pair)
