"""AdamW and its learning rate."""

import math

from torch import nn
from torch.optim import AdamW

from accessory.parallel.fsdp import show_masters
from accessory.train.config import OptimSection


def make_optimizer(model: nn.Module, config: OptimSection) -> AdamW:
    """Fused AdamW over a model's masters; matrices decay, norms and biases (vectors) do not."""
    show_masters(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, steps: int, steps_per_epoch: int, config: OptimSection) -> float:
    """The rate of optimiser step ``step`` (from 0) of ``steps``: linear warm-up, then a cosine down to ``min_lr``."""
    warmup = min(steps, round(config.warmup_epochs * steps_per_epoch))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
