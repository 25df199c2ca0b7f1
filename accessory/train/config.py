"""A run's YAML file, typed. Every default stands here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from accessory.checkpoint.storage import FileFormat
from accessory.config import apply_overrides, from_mapping, read_mapping
from accessory.errors import UserError
from accessory.parallel.fsdp import DataParallel


@dataclass(frozen=True)
class ModelSection:
    # null: the checkpoint's own; expert or sparse (mixtral_peft is the expert layout)
    layout: Literal["mixtral", "mixtral_sparse", "mixtral_peft"] | None = None
    # directory to start from, of any format, or several in order; null: random weights from the seed
    checkpoint: str | tuple[str, ...] | None = None
    config: str | None = None  # config.json; null: the checkpoint's own
    tokenizer: str | None = None  # tokenizer.model or tokenizer.json; null: the checkpoint's own
    strict: bool = True  # false: go on if tensors of the checkpoint are missing, misshapen or unexpected
    kernel: Literal["auto", "grouped", "looped", "reference"] = "auto"  # how experts are computed; auto: by device


@dataclass(frozen=True)
class DataSection:
    mix: str  # YAML data mix
    max_seq_len: int | None = None  # tokens; null: the model's max_seq_len
    packing: bool = False  # put several samples into each row of max_seq_len tokens, where none sees another
    validation: float = 0.02  # share of the samples held out, if the mix has no source marked split: validation
    bad_records: Literal["error", "skip"] = "error"  # skip: they are counted, and listed in the run directory


@dataclass(frozen=True)
class ParallelSection:
    model_parallel: int = 1  # ranks that hold one copy of the model
    data_parallel: DataParallel = "fsdp"  # over the other ranks: fsdp | sdp (keep gathered) | ddp (replicate)
    precision: Literal["bf16", "fp32", "fp64"] = "bf16"  # of forward and backward; masters are at least fp32
    recompute: bool = True  # drop activations inside blocks, compute them again in backward


@dataclass(frozen=True)
class LoraSection:
    rank: int = 16
    alpha: float | None = None  # null: the rank, so that B A is added as it is
    rslora: bool = False  # scale B A by alpha / sqrt(rank) rather than alpha / rank
    dropout: float = 0.0  # share of A's inputs dropped (the embedding's never are)
    # attention | experts | router | embeddings | output, or regular expressions found in logical names of matrices
    targets: tuple[str, ...] = ("attention", "experts")


@dataclass(frozen=True)
class TuningSection:
    """What trains. With lora, bias, norm and train all left alone, everything does; else their union, and nothing else."""

    lora: LoraSection | None = None  # lora: {} takes its defaults
    bias: bool = False  # add biases, starting at zero, to wq, wk, wv, wo and the experts' w1, w2, w3
    norm: bool = False  # train the norms
    # experts | attention | router | norms | embeddings | output, or regular expressions found in logical names
    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()  # the same words: what of the above does not train


@dataclass(frozen=True)
class OptimSection:
    lr: float = 2e-5
    min_lr: float = 0.0  # where the cosine ends
    warmup_epochs: float = 0.03  # linear warm-up, in epochs
    weight_decay: float = 0.0  # never on norms and biases
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_grad: float = 2.0  # largest 2-norm of the whole model's gradient


@dataclass(frozen=True)
class TrainSection:
    epochs: int = 1
    max_steps: int | None = None  # stop (and end the schedule) after so many optimiser steps
    batch_size: int = 4  # rows per micro-step and data-parallel rank; a row is a sample or, with data.packing, several
    accumulation: int = 1  # micro-steps per optimiser step
    # statistics the load-balancing loss is taken over. global: the whole global batch (with accumulation > 1 that
    # costs one more forward); document: each sample on its own (free). Neither depends on how the batch is cut.
    balance: Literal["global", "document"] = "global"
    seed: int = 0


@dataclass(frozen=True)
class LogSection:
    every: int = 10  # steps
    validate_every: int | None = None  # steps; null: before the first step and after every epoch
    tensorboard: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "accessory"  # of wandb


@dataclass(frozen=True)
class SaveSection:
    every_epochs: int = 1  # the last epoch is always saved
    # only what trains, with the base's fingerprint, rather than a whole model; with LoRA or biases always so
    only_trainable: bool = False
    format: FileFormat = "safetensors"  # or pth; of a whole model


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    data: DataSection
    out: str  # run directory
    model: ModelSection = field(default_factory=ModelSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    tuning: TuningSection = field(default_factory=TuningSection)
    optim: OptimSection = field(default_factory=OptimSection)
    train: TrainSection = field(default_factory=TrainSection)
    log: LogSection = field(default_factory=LogSection)
    save: SaveSection = field(default_factory=SaveSection)

    def __post_init__(self) -> None:
        at_least_one = {
            "parallel.model_parallel": self.parallel.model_parallel,
            "train.epochs": self.train.epochs,
            "train.max_steps": self.train.max_steps,
            "train.batch_size": self.train.batch_size,
            "train.accumulation": self.train.accumulation,
            "data.max_seq_len": self.data.max_seq_len,
            "tuning.lora.rank": self.tuning.lora.rank if self.tuning.lora else None,
            "log.every": self.log.every,
            "log.validate_every": self.log.validate_every,
            "save.every_epochs": self.save.every_epochs,
        }
        for name, value in at_least_one.items():
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, found {value}")
        if not 0 <= self.data.validation < 1:
            raise UserError(f"data.validation is a share of the samples, at least 0 and below 1: {self.data.validation}")
        if self.tuning.lora and self.tuning.lora.alpha is not None and not self.tuning.lora.alpha > 0:
            raise UserError(f"tuning.lora.alpha must be above 0, found {self.tuning.lora.alpha}")
        if self.tuning.lora and self.tuning.lora.alpha is not None and not self.tuning.lora.alpha > 0:
            raise UserError(f"tuning.lora.alpha must be above 0, or the adapter adds nothing: {self.tuning.lora.alpha}")
        if self.tuning.lora and not 0 <= self.tuning.lora.dropout < 1:
            raise UserError(f"tuning.lora.dropout must be at least 0 and below 1: {self.tuning.lora.dropout}")
        if self.optim.lr <= 0 or self.optim.clip_grad <= 0:
            raise UserError("optim.lr and optim.clip_grad must be above 0")
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
