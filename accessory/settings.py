"""A run's YAML file, typed. Every default stands here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from accessory.config import (
    Count,
    Fraction,
    NonNegative,
    OneOrMore,
    Positive,
    Repeats,
    Seed,
    Share,
    Text,
    WholeNumber,
    apply_overrides,
    from_mapping,
    read_bytes,
    read_mapping,
)
from accessory.errors import UserError

LayoutName = Literal["mixtral", "mixtral_sparse", "mixtral_peft"]
BalanceMode = Literal["document", "global", "microbatch", "hf", "bias"]
DataParallel = Literal["fsdp", "sdp", "ddp"]
Recompute = Literal["none", "norms_and_experts", "block"]
FileFormat = Literal["safetensors", "pth"]
SavedFormat = Literal["safetensors", "pth", "hf"]
LONGEST_COLLECTIVE_S = 1800
"""After so long a collective fails, if the watchdog has not ended the job before."""


@dataclass(frozen=True)
class QuantiseSection:
    """How matrices are held that stay as they are: nf4 | int4 | int3 | int2 | int8, a block's size behind it (nf4-64).

    null: whole. Norms, routers, embeddings and output are always whole.
    """

    experts: Text | None = None
    attention: Text | None = None

    @classmethod
    def read(cls, given: "bool | str | Mapping[str, Any] | QuantiseSection | None") -> "QuantiseSection | None":
        """What a person writes: True or "nf4" for both, {"experts": "nf4"}, "experts=nf4,attention=int8"; nothing: None."""
        if not given:
            return None
        if isinstance(given, QuantiseSection):
            return given
        if given is True:
            given = "nf4"
        if isinstance(given, str):
            given = given if "=" in given else f"experts={given},attention={given}"
            given = dict(part.partition("=")[::2] for part in given.split(","))
        if not isinstance(given, Mapping):
            raise UserError(f"quantise: expected a name such as nf4, or a mapping of experts and attention, found {given!r}")
        return from_mapping(cls, given, "quantise")


@dataclass(frozen=True)
class OffloadSection:
    """Experts that stay as they are lie in host memory, or on a disk, and come to the device when tokens need them."""

    experts: Count | None = None  # of each layer on a rank's device, at least as many as a token takes; or:
    device_memory: Text | None = None  # what a rank may take of its device, such as 14GB: as many experts as fit
    # which expert makes room for another: the one that was used least often of late, or longest ago
    policy: Literal["frequency", "lru"] = "frequency"
    # speculative: while a layer runs, bring what the next one's router would choose, if that is mostly right; of no matter
    # in training
    prefetch: Literal["speculative", "none"] = "speculative"
    disk: Text | None = None  # directory on whose disk they lie; null: host memory
    # a run of the model, whose routers' loads say which experts are on the device first; null: those used first
    loads: Text | None = None

    def __post_init__(self) -> None:
        if (self.experts is None) == (self.device_memory is None):
            raise UserError("experts, how many of each layer are on the device, or device_memory must be given, not both")
        if self.device_memory is not None:
            read_bytes(self.device_memory, "device_memory")

    @classmethod
    def read(cls, given: "str | Mapping[str, Any] | OffloadSection | None") -> "OffloadSection | None":
        """What a person writes: "experts=4,policy=frequency", or {"device_memory": "14GB"}; nothing: None."""
        if not given:
            return None
        if isinstance(given, OffloadSection):
            return given
        if isinstance(given, str) and "=" in given:
            given = apply_overrides({}, given.split(","))
        if not isinstance(given, Mapping):
            raise UserError(f"offload: expected experts=4, device_memory=14GB or a mapping of such keys, found {given!r}")
        return from_mapping(cls, given, "offload")


@dataclass(frozen=True)
class ModelSection:
    # null: the checkpoint's own; expert or sparse (mixtral_peft is the expert layout)
    layout: LayoutName | None = None
    # directory to start from, of any format, or several in order; null: random weights from the seed
    checkpoint: Text | tuple[Text, ...] | None = None
    config: Text | None = None  # config.json; null: the checkpoint's own
    # train a classifier: the names of the records' labels, in the order of its logits; empty: the next token is learnt
    labels: tuple[Text, ...] = ()
    tokenizer: Text | None = None  # tokenizer.model or tokenizer.json; null: the checkpoint's own
    # false: go on if tensors of the checkpoint are missing, misshapen or unexpected, or hold NaN or infinite values
    strict: bool = True
    # hold what stays as it is in 8 or 4 bits, as it is read: {experts: nf4, attention: int8}; null: as the checkpoint has it
    quantise: QuantiseSection | None = None
    # experts that do not train lie elsewhere than on the device: {experts: 4} (docs/offloading.md); null: all are on it
    offload: OffloadSection | None = None
    kernel: str = "auto"  # how experts are computed: a name of the table in model/moe/kernels; auto: by device

    def __post_init__(self) -> None:
        if self.checkpoint == ():
            raise UserError("checkpoint is an empty list: name a directory, or null for random weights")


@dataclass(frozen=True)
class DataSection:
    mix: Text  # YAML data mix
    max_seq_len: Count | None = None  # tokens; null: the model's max_seq_len
    packing: bool = False  # put several samples into each row of max_seq_len tokens, where none sees another
    validation: Share = 0.02  # share of the samples held out, if the mix has no source marked split: validation
    bad_records: Literal["error", "skip"] = "error"  # skip: they are counted, and listed in the run directory

    def __post_init__(self) -> None:
        if self.max_seq_len is not None and self.max_seq_len < 2:
            raise UserError(
                f"max_seq_len must be at least 2, for a token is learnt from those before it; found {self.max_seq_len}"
            )


@dataclass(frozen=True)
class ParallelSection:
    model_parallel: Count = 1  # ranks that hold one copy of the model
    # over the other ranks:
    #   fsdp  each block's parameters are gathered for its forward and its backward, its gradients reduced in each micro-step
    #   sdp   gathered and reduced once a step, and whole in between: with accumulation less to send, and more memory
    #   ddp   every rank has all of them
    data_parallel: DataParallel = "fsdp"
    # fsdp and sdp: so many neighbouring data-parallel ranks share out one copy of what a rank has, and others have copies
    # (HSDP: a node's GPUs, say, so that parameters are gathered inside the node); null: all of them, one copy
    shard_size: Count | None = None
    precision: Literal["bf16", "fp32", "fp64"] = "bf16"  # of forward and backward; masters are at least fp32
    # what backward makes again rather than keeps: none | norms_and_experts (what costs no product of matrices; a block of
    # Mixtral 8x7B then keeps 153 kB of each token, over 8 model-parallel ranks 34) | block (all but its input, 8 kB)
    recompute: Recompute = "block"
    # seconds without a forward, a tensor read or written, or a record tokenised on any rank, after which the job ends;
    # at the start, seconds until all ranks must have come
    stall_timeout_s: Positive = 600

    def __post_init__(self) -> None:
        if self.data_parallel == "ddp" and self.shard_size is not None:
            raise UserError("data_parallel=ddp shards nothing: leave shard_size out, or choose fsdp")
        if not 1 <= self.stall_timeout_s <= LONGEST_COLLECTIVE_S:
            raise UserError(
                f"stall_timeout_s must be from 1 to {LONGEST_COLLECTIVE_S}, after which a collective gives up: "
                f"found {self.stall_timeout_s:g}"
            )

    def dp_shard(self) -> int | None:
        """How many data-parallel ranks share out one copy; None: all."""
        return 1 if self.data_parallel == "ddp" else self.shard_size


@dataclass(frozen=True)
class LoraSection:
    rank: Count = 16
    alpha: Positive | None = None  # null: the rank, so that B A is added as it is
    rslora: bool = False  # scale B A by alpha / sqrt(rank) rather than alpha / rank
    dropout: Share = 0.0  # share of A's inputs dropped (the embedding's never are)
    # attention | experts | router | embeddings | output, or regular expressions found in logical names of matrices
    targets: tuple[str, ...] = ("attention", "experts")


@dataclass(frozen=True)
class TuningSection:
    """What trains. With lora, bias and train all left alone, everything does; else their union, and nothing else."""

    lora: LoraSection | None = None  # lora: {} takes its defaults
    bias: bool = False  # add biases, starting at zero, to wq, wk, wv, wo and the experts' w1, w2, w3
    # experts | attention | router | norms | embeddings | output, or regular expressions found in logical names
    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()  # the same words: what of the above does not train


@dataclass(frozen=True)
class OptimSection:
    lr: Positive = 2e-5
    min_lr: NonNegative = 0.0  # where the cosine ends
    warmup_epochs: NonNegative = 0.03  # linear warm-up, in epochs
    weight_decay: NonNegative = 0.0  # never on norms and biases
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Positive = 1e-8
    clip_grad: Positive = 2.0  # largest 2-norm of the whole model's gradient

    def __post_init__(self) -> None:
        if self.min_lr > self.lr:
            raise UserError(f"min_lr {self.min_lr:g} lies above lr {self.lr:g}: the cosine falls from lr to min_lr")


@dataclass(frozen=True)
class TrainSection:
    epochs: Repeats = 1
    max_steps: Count | None = None  # stop (and end the schedule) after so many optimiser steps
    batch_size: Count = 4  # rows per micro-step and data-parallel rank; a row is a sample or, with data.packing, several
    accumulation: Repeats = 1  # micro-steps per optimiser step
    # what the load-balancing loss is taken over (docs/balance.md has the formulas)
    #   document    each sample on its own, weighed by its length
    #   global      the global batch; with accumulation > 1 that costs one more forward
    #   microbatch  each rank's micro-batch, as LLaMA2-Accessory: depends on ranks, batch_size and accumulation
    #   hf          Hugging Face's, all layers as one: depends on the same; balanced = experts per token, not 1
    #   bias        no loss: a bias in the choice of experts, moved after each step by the counts of the global batch
    # document, global and bias depend on nothing of how the batch is cut
    balance: BalanceMode = "document"
    balance_weight: NonNegative | None = None  # of that loss; null: load_balancing_weight of the model's config.json
    bias_rate: NonNegative = 0.001  # how far an expert's bias moves in a step (Wang et al. 2024)
    # LLaMA2-Accessory's numbers, to compare curves: the mean cross-entropy of each micro-batch, then over micro-batches
    # and ranks, and padding counts in the balance loss. Needs balance: microbatch. Its expert layout multiplied the
    # weight in twice: to compare with that, set balance_weight to the square, 0.01 for 0.1
    reference_loss: bool = False
    z_loss_weight: NonNegative = 0.0  # of the mean of (log sum exp of the router's logits)^2; ST-MoE takes 0.001
    seed: Seed = 0


@dataclass(frozen=True)
class AlarmSection:
    """What of a layer's routing is said on the console as soon as it holds (docs/metrics.md); null: never."""

    load_min: Fraction | None = 0.01  # an expert gets less than so much of its fair share of the tokens
    load_max: OneOrMore | None = 3.0  # one gets more than so many fair shares
    entropy_share: Fraction | None = 0.1  # the router's entropy falls below so much of its greatest, log E
    routing_change: Fraction | None = 0.3  # more than so much of the choices of the checkpoint's probe tokens are others now


@dataclass(frozen=True)
class LogSection:
    every: Count = 10  # steps
    validate_every: Count | None = None  # steps; null: before the first step and after every epoch
    tensorboard: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "accessory"  # of wandb
    # held-out tokens (else training ones) whose routing is compared with the starting model's at every validation; 0: none
    probe_tokens: WholeNumber = 4096
    alarms: AlarmSection = field(default_factory=AlarmSection)


@dataclass(frozen=True)
class SaveSection:
    every_epochs: Count = 1  # the last epoch is always saved
    # only what trains, with the base's fingerprint, rather than a whole model; with LoRA or biases always so
    only_trainable: bool = False
    # of a whole model: safetensors or pth, a file for each model-parallel rank in the layout it runs in; hf: Hugging Face's
    format: SavedFormat = "safetensors"
    best: bool = False  # keep the model of the lowest validation loss so far in OUT/best as well
    # optimiser steps between training states, to resume from: what trains in at least fp32 and AdamW's two moments, 12
    # bytes a trained parameter in OUT/states. The last step has one too. null: none
    state_every: Count | None = 500
    keep_states: Count = 2  # the newest; if one is damaged, resume=auto goes on from the one before
    keep_every: Count | None = None  # steps: states at multiples of it stay as well, for ever; a multiple of state_every

    def __post_init__(self) -> None:
        if self.state_every is None and self.keep_states != SaveSection.keep_states:
            raise UserError(f"keep_states {self.keep_states} keeps nothing while state_every is null: set that too")
        if self.keep_every is not None and self.keep_every % (self.state_every or self.keep_every + 1):
            raise UserError(
                f"keep_every {self.keep_every} is no multiple of state_every {self.state_every}: it would keep no state"
            )


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    data: DataSection
    out: Text  # run directory
    model: ModelSection = field(default_factory=ModelSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    tuning: TuningSection = field(default_factory=TuningSection)
    optim: OptimSection = field(default_factory=OptimSection)
    train: TrainSection = field(default_factory=TrainSection)
    log: LogSection = field(default_factory=LogSection)
    save: SaveSection = field(default_factory=SaveSection)
    # a directory in OUT/states, or auto: the newest of them, if there is one; null: begin, and refuse to where one is; none
    # begins where models of another run are
    resume: Text | None = None

    def __post_init__(self) -> None:
        if self.train.reference_loss and (self.train.balance != "microbatch" or self.data.packing):
            raise UserError(
                "train.reference_loss gives LLaMA2-Accessory's numbers: set train.balance=microbatch and "
                "data.packing=false with it, as that has it"
            )
        if self.train.reference_loss and self.model.labels:
            raise UserError(
                "train.reference_loss gives LLaMA2-Accessory's numbers, and that trains no classifier: take it out"
            )
        if self.model.quantise and self.model.checkpoint is None:
            raise UserError("model.quantise is of a model that is there: name model.checkpoint, or take it out")
        if self.model.offload and not (self.tuning.lora or self.tuning.bias or self.tuning.train):
            raise UserError("model.offload is of experts that do not train: train adapters (tuning.lora), or take it out")
        if self.train.balance == "bias" and (self.tuning.lora or self.tuning.bias or self.save.only_trainable):
            raise UserError(
                "train.balance=bias changes the routers themselves, and what is saved beside a base has no place for it: "
                "choose another train.balance, or train and save the whole model"
            )
        if self.optim.warmup_epochs > self.train.epochs:
            raise UserError(
                f"optim.warmup_epochs {self.optim.warmup_epochs:g} lies above train.epochs {self.train.epochs}: the run "
                "would be over before optim.lr is reached"
            )
        if self.save.format != "safetensors" and (self.tuning.lora or self.tuning.bias or self.save.only_trainable):
            raise UserError(
                f"save.format={self.save.format} is of whole models, and this run saves what trains, as safetensors: leave "
                "it out, and accessory merge or convert writes a whole model in any format"
            )
        if self.model.checkpoint is None and (self.tuning.lora or self.tuning.bias or self.save.only_trainable):
            raise UserError(
                "adapters belong to a base: name one with model.checkpoint, or train all of a model from random weights"
            )
        if self.model.checkpoint is None and None in (self.model.config, self.model.tokenizer, self.model.layout):
            raise UserError(
                "name model.checkpoint (a directory to start from), or model.config, model.tokenizer and model.layout "
                "to start from random weights"
            )

    @classmethod
    def load(cls, path: str | Path, overrides: list[str]) -> "RunConfig":
        """Read a run's YAML file and apply ``key.sub=value`` overrides."""
        return from_mapping(cls, apply_overrides(read_mapping(path), overrides), str(path))
