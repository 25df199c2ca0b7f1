"""AdamW and its learning rate."""

import math

from torch import nn
from torch.optim import AdamW

from accessory.parallel.fsdp import show_masters
from accessory.settings import OptimSection
from accessory.train.plan import Plan, Step


def make_optimizer(model: nn.Module, config: OptimSection) -> AdamW:
    """Fused AdamW over a model's masters; matrices decay, norms and biases (vectors) do not."""
    show_masters(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: Step, plan: Plan, config: OptimSection) -> float:
    """The rate of an optimiser step: linear warm-up, then a cosine down to ``min_lr``.

    A function of the rows seen, so that a run that goes on with another global batch stays on the same curve.
    """
    total = plan.end.rows
    warmup = min(total, config.warmup_epochs * plan.epoch_rows[0])
    if step.before.rows < warmup:
        return config.lr * min(1.0, step.after.rows / warmup)
    progress = (step.before.rows - warmup) / max(1, total - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
