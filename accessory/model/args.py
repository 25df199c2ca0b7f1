"""The model's shape, as a checkpoint's ``config.json`` states it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from accessory.config import Bounds, Count, NonNegative, Positive, Text, from_mapping, read_mapping
from accessory.errors import UserError
from accessory.model.codecs import get_codec
from accessory.model.visual import VisualArgs
from accessory.settings import QuantiseSection

FewThousand = Annotated[int, Bounds(least=1, below=10_000)]
"""A count of layers or experts. Each has tensors of its own, and listing those of a billion would take hours."""


@dataclass(frozen=True)
class MoEArgs:
    """``score_bias``: each router adds a vector [E] to its probabilities to choose experts (Wang et al. 2024)."""

    num_experts: FewThousand
    num_experts_per_tok: Count
    score_bias: bool = False


@dataclass(frozen=True)
class ModelArgs:
    """A Mixtral-class decoder. Sizes have no defaults; the other defaults are LLaMA2-Accessory's.

    Attributes:
        rope_scaling: multiplies positions; None: 1.
        sliding_window: keys that a query sees, its own token's included; None: all.
        load_balancing_weight: of the balance loss (1.0 = balanced routing) in the training loss.
        labels: of a classifier, in the order of its logits; empty: the model predicts the next token.
        quantise: how some of the matrices are quantised (``model/codecs.py``); None: none is.
        visual: how the model sees images; None: it reads text only.
    """

    dim: Count
    hidden_dim: Count
    head_dim: Count
    n_layers: FewThousand
    n_heads: Count
    n_kv_heads: Count
    vocab_size: Count
    moe: MoEArgs
    norm_eps: Positive = 1e-5
    rope_theta: Positive = 1e6
    rope_scaling: Positive | None = None
    sliding_window: Count | None = None
    max_batch_size: int = 32
    max_seq_len: Count = 4096
    load_balancing_weight: NonNegative = 0.1
    labels: tuple[Text, ...] = ()
    quantise: QuantiseSection | None = None
    visual: VisualArgs | None = None

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_kv_heads {self.n_kv_heads} must divide n_heads {self.n_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim must be even for rotary embedding, found {self.head_dim}")
        if self.moe.num_experts_per_tok > self.moe.num_experts:
            raise UserError(
                f"moe.num_experts_per_tok {self.moe.num_experts_per_tok} lies above moe.num_experts {self.moe.num_experts}"
            )
        if self.labels and not 1 < len(self.labels) == len(set(self.labels)):
            raise UserError(f"labels must be two or more, each named once; found {', '.join(self.labels)}")
        if self.quantise:
            self._check_quantised(self.quantise)

    def _check_quantised(self, quantise: QuantiseSection) -> None:
        """Raise UserError if the rows of a quantised matrix are not whole blocks."""
        widths = {
            "experts": {"dim": self.dim, "hidden_dim": self.hidden_dim},
            "attention": {"dim": self.dim, "n_heads x head_dim": self.n_heads * self.head_dim},
        }
        for matrices, name in vars(quantise).items():
            if not name:
                continue
            codec = get_codec(name)
            for size, width in widths[matrices].items():
                if width % (codec.group or 1):
                    raise UserError(
                        f"quantise.{matrices} {codec.name}: {size} {width} is no multiple of a block of {codec.group}: take "
                        f"smaller blocks, as {codec.kind}-8, or int8, which has none"
                    )

    @classmethod
    def load(cls, path: str | Path) -> "ModelArgs":
        """Read ``config.json``. Raises UserError on an unknown key, naming the nearest."""
        return from_mapping(cls, read_mapping(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json. Keys that other programs do not know are written only if they are used."""
        values = dataclasses.asdict(self)
        if not self.moe.score_bias:
            del values["moe"]["score_bias"]
        if not self.labels:
            del values["labels"]
        if not self.quantise:
            del values["quantise"]
        del values["visual"]
        if self.visual:
            values["visual"] = self.visual.to_dict()
        return values

    def active_parameters(self) -> int:
        """Parameters used for one token, without the embedding (FLOPs per trained token = 6 x this + attention)."""
        attention = 2 * self.dim * self.head_dim * (self.n_heads + self.n_kv_heads)
        experts = 3 * self.moe.num_experts_per_tok * self.dim * self.hidden_dim
        outputs = len(self.labels) or self.vocab_size
        return self.n_layers * (attention + experts + self.dim * self.moe.num_experts) + self.dim * outputs

    def train_flops_per_token(self, seq_len: int, trained: float = 1.0) -> float:
        """Forward + backward FLOPs of one token in a causal sequence of ``seq_len`` (recompute not counted).

        ``trained``: share of the parameters that train; the gradients of the others are not computed.
        """
        window = min(seq_len, self.sliding_window or seq_len)
        products = (4.0 + 2.0 * trained) * self.active_parameters()
        return products + 6.0 * self.n_layers * self.n_heads * self.head_dim * window
