"""The model of a run: what it starts from, what of it trains, and its optimiser."""

import dataclasses
from functools import cached_property

import torch

from accessory.checkpoint.convert import Target
from accessory.checkpoint.description import Description
from accessory.checkpoint.open import Checkpoint
from accessory.checkpoint.publish import check_companions
from accessory.checkpoint.state import TrainingState
from accessory.console import say
from accessory.data.tokenizer import Tokenizer, check_vocabulary
from accessory.dtypes import at_least, get_dtype
from accessory.errors import UserError
from accessory.model.args import ModelArgs
from accessory.model.build import RandomWeights, build_model
from accessory.model.logical import Overlaid, Shape, Source, check_divides, is_buffer
from accessory.model.memory import Footprint, check_memory, footprint
from accessory.model.moe.kernels import pick_kernel
from accessory.model.moe.layouts import get_layout
from accessory.model.moe.offload.plan import OffloadPlan, plan_offload
from accessory.model.visual import VisualArgs
from accessory.parallel.fsdp import wrap
from accessory.parallel.launch import Launch
from accessory.parallel.mesh import Mesh
from accessory.parallel.watchdog import progressed
from accessory.settings import RunConfig
from accessory.train.metrics import peak_flops
from accessory.train.optim import make_optimizer
from accessory.train.state import check_state, load_moments
from accessory.tuning.spec import check_goes_on, resolve
from accessory.tuning.table import tuning_table
from accessory.tuning.watch import watch_adapters
from accessory.visual.vision import RandomEncoders, Vision, count_of_encoders, make_vision


class Start:
    """What a run starts from, as its configuration says: all that can be wrong before data and weights are read.

    Attributes:
        args, layout: of the model. tokenizer; companions: files that go with what is saved, by name.
        checkpoint: None if the weights are random.
        tuning: what trains. only_trainable: whether only that is saved. width: tokens of a row of the batch at most.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, launch: Launch):
        section, compute = config.model, get_dtype(config.parallel.precision)
        self.checkpoint: Checkpoint | None = None
        if section.checkpoint:
            self.checkpoint = Checkpoint(section.checkpoint, section.config, section.strict, section.quantise)
            self.args = self.checkpoint.args
            self.layout = get_layout(section.layout) if section.layout else self.checkpoint.layout
            tokenizer = section.tokenizer or self.checkpoint.tokenizer
            self.checkpoint.check_encoders()
            if tokenizer is None:
                raise UserError(f"{section.checkpoint}: no tokenizer.model or tokenizer.json in it; set model.tokenizer")
            companions = {} if section.tokenizer else self.checkpoint.companions
        else:
            assert section.config and section.tokenizer and section.layout  # RunConfig has checked
            self.layout, tokenizer, companions = get_layout(section.layout), section.tokenizer, {}
            # as the reference does where config.json does not say it
            self.args = Description.read(section.config).args({"vocab_size": Tokenizer(tokenizer).n_words})
        self.args = _as_trained(self.args, config, self.checkpoint.visual if self.checkpoint else self.args.visual)
        self.tokenizer = Tokenizer(tokenizer)
        self.companions = companions | self.tokenizer.files
        check_companions(self.companions)
        check_vocabulary(self.tokenizer, self.args.vocab_size)
        check_divides(self.args, self.layout, mesh.mp.size)
        row = torch.empty(1, self.args.dim, dtype=compute, device=launch.device)
        hidden_dim = self.layout.local_hidden_dim(self.args.hidden_dim, mesh.mp)
        pick_kernel(section.kernel, row, hidden_dim)  # refused now if it cannot be had, not in the first step
        given = self.checkpoint.logical.adapters if self.checkpoint else {}
        self.tuning = resolve(config.tuning, self.args, config.train.seed, given)
        logical = self.tuning.logical
        self.only_trainable = bool(logical.adapters) or config.save.only_trainable
        if not self.only_trainable:
            Target.of_run(config.save.format, self.layout, mesh.mp.size).check(self.args)
        if self.checkpoint:
            check_goes_on(given, self.checkpoint.changed, self.tuning, self.only_trainable)
        trains, wide = self.tuning.trains, at_least(compute)
        self.width = config.data.max_seq_len or self.args.max_seq_len
        self.offload: OffloadPlan | None = None
        if section.offload:
            others = self._footprint(config, mesh, launch.device, 0).total
            self.offload = plan_offload(
                section.offload, logical, self.layout, mesh.mp.size, compute, others, section.kernel, trains
            )
        slot_bytes = self.offload.slot_bytes if self.offload else None
        if mesh.world.size == launch.world:  # else a dry run plans for other machines
            check_memory(
                logical,
                self.layout,
                mesh,
                launch.device,
                wide,
                trains=trains,
                frozen_dtype=compute,
                sharing=launch.sharing,
                beside=self.encoders,
                slot_bytes=slot_bytes,
            )
        if self.width > self.args.max_seq_len:
            say(
                f"warning: data.max_seq_len {self.width} lies above the model's max_seq_len {self.args.max_seq_len}: it has "
                "not seen such positions, and must learn them (or set rope_scaling in its config.json)"
            )

    def footprint(self, config: RunConfig, mesh: Mesh, device: torch.device) -> Footprint:
        """What memory a rank needs."""
        return self._footprint(config, mesh, device, self.offload.slot_bytes if self.offload else None)

    def _footprint(self, config: RunConfig, mesh: Mesh, device: torch.device, slot_bytes: int | None) -> Footprint:
        return footprint(
            self.tuning.logical,
            self.layout,
            mesh,
            config.parallel,
            compute=get_dtype(config.parallel.precision),
            trains=self.tuning.trains,
            tokens=config.train.batch_size * self.width,
            accumulation=config.train.accumulation,
            device_type=device.type,
            beside=self.encoders,
            slot_bytes=slot_bytes,
        )

    @cached_property
    def encoders(self) -> int:
        """Numbers of what the model sees with."""
        return count_of_encoders(self.args.visual)

    @cached_property
    def in_state(self) -> dict[str, Shape]:
        """What a training state of the run holds: the tensors that train, and buffers."""
        shapes = self.tuning.logical.shapes
        return {name: shape for name, shape in shapes.items() if name in self.tuning.trains or is_buffer(name)}

    @cached_property
    def base(self) -> str | None:
        """The fingerprint of the model below, if a training state leaves something of it out."""
        leaves_out = self.in_state != self.tuning.logical.shapes
        return self.checkpoint.fingerprint if self.checkpoint and leaves_out else None


def described(config: RunConfig, start: Start, mesh: Mesh) -> str:
    """The model and how it is cut, in a line."""
    total, parallel = sum(start.tuning.logical.sizes.values()), config.parallel
    copies = f", {mesh.dp_replicate.size} copies" if parallel.shard_size and mesh.dp_replicate.size > 1 else ""
    offload = f"\noffload: {start.offload}" if start.offload else ""
    return (
        f"model: {total / 1e6:,.1f} M parameters, {start.args.active_parameters() / 1e6:,.1f} M active per token; layout "
        f"{start.layout.name}, model parallel {mesh.mp.size} x data parallel {mesh.dp.size} "
        f"({parallel.data_parallel}{copies}), {parallel.precision}{offload}"
    )


def _as_trained(args: ModelArgs, config: RunConfig, visual: VisualArgs | None) -> ModelArgs:
    """The model's description as the run trains and saves it."""
    if args.labels and args.labels != config.model.labels:
        raise UserError(
            f"the model that the run starts from classifies into {', '.join(args.labels)}: name them in this order, "
            "model.labels: [...]"
        )
    args = dataclasses.replace(args, labels=config.model.labels, visual=visual)
    if config.train.balance_weight is not None:
        args = dataclasses.replace(args, load_balancing_weight=config.train.balance_weight)
    if config.train.balance == "bias":
        args = dataclasses.replace(args, moe=dataclasses.replace(args.moe, score_bias=True))
    return args


class RunModel:
    """The model that trains, with its optimiser.

    Attributes:
        model: the decoder, sharded over data-parallel ranks. vision: what it sees with.
        trained_share: the share of the parameters that trains.
    """

    vision: Vision | None = None

    def __init__(
        self, config: RunConfig, start: Start, state: TrainingState | None, data_digest: str, mesh: Mesh, launch: Launch
    ):
        """``state``: what the run goes on from; ``data_digest``: of the samples that it must have."""
        progressed("making the model")
        parallel, seed, args, checkpoint = config.parallel, config.train.seed, start.args, start.checkpoint
        compute, tuning, logical = get_dtype(parallel.precision), start.tuning, start.tuning.logical
        source: Source = RandomWeights(logical, seed)
        if checkpoint:
            source = Overlaid(source, checkpoint, checkpoint.logical.shapes)
        if state:
            check_state(state, args, start.in_state, data_digest, start.base)
            source = Overlaid(source, state, state.names)
        self.model = build_model(
            logical,
            start.layout,
            source,
            mesh=mesh,
            dtype=at_least(compute),
            device=launch.device,
            kernel=config.model.kernel,
            recompute=parallel.recompute,
            trains=tuning.trains,
            frozen_dtype=compute,
            offload=start.offload,
            refuse_damaged=config.model.strict,
            shard=lambda model: wrap(model, mesh, parallel.data_parallel, compute, launch.device.type),
        )
        if checkpoint:
            self.vision = checkpoint.vision(mesh.mp, compute, launch.device)
        elif args.visual:
            self.vision = make_vision(args.visual, RandomEncoders(args.visual, seed), mesh.mp, compute, launch.device)
        self.model.vision = self.vision
        self.model.register_forward_pre_hook(lambda *_: progressed())
        self.optimizer = make_optimizer(self.model, config.optim)
        if state:
            load_moments(self.model, self.optimizer, state)
        watch_adapters(self.model, self.optimizer, logical.added)
        total = sum(logical.sizes.values())
        self.trained_share = sum(logical.sizes[name] for name in tuning.trains) / total
        self.peak_flops, origin = peak_flops(launch.device, compute)
        say(
            f"{described(config, start, mesh)}\n"
            f"MFU is taken of {self.peak_flops / 1e12:.3g} TFLOP/s per rank ({origin})\n"
            f"{tuning_table(self.model)}"
        )
