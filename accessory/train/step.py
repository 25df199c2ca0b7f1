"""The training step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from accessory.data.loader import Batch
from accessory.model.decoder import Decoder
from accessory.model.head import LossSum
from accessory.parallel.fsdp import global_grad_norm, local_part, sync_gradients
from accessory.settings import BalanceMode
from accessory.train.balance import shift_score_biases, step_balance, z_loss
from accessory.train.nonfinite import NotFinite


@dataclass(frozen=True)
class StepResult:
    """What a step did, on the device. Sums are this rank's, to be added over data-parallel ranks when they are logged."""

    loss_sum: Tensor  # cross-entropy over this rank's targets
    balance: Tensor  # this rank's share of the balance loss
    z: Tensor  # this rank's share of the z-loss
    counts: Tensor  # [L, E] rows this rank routed to each expert
    entropy: Tensor  # [L] sum over this rank's tokens of the entropy of the router's probabilities, in nats
    targets: Tensor  # targets of the whole global batch
    tokens: Tensor  # real tokens of the whole global batch
    grad_norm: Tensor  # before clipping, of the whole model


def train_step(
    model: Decoder,
    optimizer: Optimizer,
    micro_batches: Sequence[Batch],
    *,
    clip_grad: float,
    balance: BalanceMode,
    z_weight: float = 0.0,
    bias_rate: float = 0.001,
    reference_loss: bool = False,
) -> StepResult:
    """One optimiser step over a global batch: ``micro_batches`` of every data-parallel rank.

    loss = cross-entropy / targets + load_balancing_weight * balance loss + z_weight * z-loss, each over the whole
    global batch.

    Args:
        balance: what the balance loss is taken over (``train.balance``); with "bias" there is none, and the routers'
            score biases move by ``bias_rate``.
        reference_loss: average the cross-entropy as LLaMA2-Accessory does: over each micro-batch, then over those.

    Raises:
        NotFinite: the loss or gradient is not; on all ranks together, before any weight has changed.
    """
    device = micro_batches[0].tokens.device
    dp = model.mesh.dp
    weight = 0.0 if balance == "bias" else model.args.load_balancing_weight

    # 1. How much there is in the whole global batch: a mean of means would depend on how it is cut.
    totals = torch.tensor([[b.target_tokens, b.real_tokens] for b in micro_batches], device=device).sum(0)
    targets, tokens = dp.all_reduce(totals)

    # 2. Its experts' loads, where the balance loss needs them before the first backward.
    balance_share = step_balance(balance, model, micro_batches, tokens)

    # 3. Forward and backward.
    loss_sum = torch.zeros((), device=device)
    balance_sum, z_sum = torch.zeros(2, device=device)
    counts = torch.zeros(model.args.n_layers, model.args.moe.num_experts, dtype=torch.int64, device=device)
    entropy = torch.zeros(model.args.n_layers, device=device)
    losses = []
    for number, batch in enumerate(micro_batches):
        sync_gradients(model, last=number == len(micro_batches) - 1)
        loss, stats = model(batch.inputs(dropout=True), LossSum(batch.targets))
        losses.append(loss.detach())
        if reference_loss:  # each micro-batch weighs the same, however many targets it has
            loss = loss * targets / (max(1, batch.target_tokens) * len(micro_batches) * dp.size)
        share = balance_share(stats)
        z = z_loss(stats, tokens)
        (loss / targets.clamp(min=1) + weight * share + z_weight * z).backward()
        loss_sum, balance_sum, z_sum = loss_sum + loss.detach(), balance_sum + share.detach(), z_sum + z.detach()
        counts, entropy = counts + stats.counts.sum(1), entropy + stats.entropy.sum(1)

    # 4. Clip by the norm of the whole model's gradient. One host sync a step, so that no bad step is ever taken.
    norm = global_grad_norm(model, {name: held.is_owner for name, held in model.holdings.items()}, model.mesh.world)
    if not norm.isfinite():
        raise NotFinite(torch.stack(losses).isfinite().tolist())
    scale = (clip_grad / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_part(p.grad) for p in model.parameters() if p.grad is not None], scale)

    # 5. Change the weights.
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if balance == "bias":
        shift_score_biases(model, dp.all_reduce(counts.clone()), bias_rate)
    return StepResult(loss_sum, balance_sum, z_sum, counts, entropy, targets, tokens, norm)
