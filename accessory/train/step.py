"""The training step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from accessory.data.loader import Batch
from accessory.model.decoder import Decoder
from accessory.parallel.fsdp import global_grad_norm, sync_gradients
from accessory.parallel.mesh import local_part
from accessory.train.balance import RouterLosses, z_loss
from accessory.train.nonfinite import NotFinite
from accessory.train.objective import Objective


@dataclass(frozen=True)
class StepResult:
    """What a step did, as tensors on the device. Sums are this rank's; the log adds them up over data-parallel ranks."""

    loss_sum: Tensor  # over this rank's targets
    balance: Tensor  # this rank's share of the balance loss
    z: Tensor  # this rank's share of the z-loss
    counts: Tensor  # [L, E] rows this rank routed to each expert
    entropy: Tensor  # [L] sum over this rank's tokens of the entropy of the router's probabilities, in nats
    of_images: Tensor  # [L, E + 1] counts and entropy of the tokens of images alone (see ``RouterStats``)
    measures: Tensor  # [...] what else the objective measures, summed
    targets: Tensor  # number of targets in the whole global batch, over which the loss is a mean
    tokens: Tensor  # real tokens of the whole global batch
    grad_norm: Tensor  # before clipping, of the whole model


def train_step(
    model: Decoder,
    optimizer: Optimizer,
    micro_batches: Sequence[Batch],
    objective: Objective,
    router_losses: RouterLosses,
    *,
    clip_grad: float,
) -> StepResult:
    """One optimiser step over a global batch: ``micro_batches`` of every data-parallel rank.

    loss = objective's loss / targets + load_balancing_weight * balance loss + z_weight * z-loss, each over the whole
    global batch.

    Raises:
        NotFinite: the loss or the gradient norm is NaN or infinite; on all ranks, before any weight has changed.
    """
    device, dp = micro_batches[0].tokens.device, model.mesh.dp
    balance_weight, z_weight = router_losses.balance_weight(model.args), router_losses.z_weight

    # 1. Count targets and tokens of the whole global batch: a mean of means would depend on how the batch is cut.
    totals = torch.tensor([[objective.targets(batch), batch.real_tokens] for batch in micro_batches], device=device).sum(0)
    targets, tokens = dp.all_reduce(totals)

    # 2. Count the experts' loads of the global batch, if the balance loss needs them before the first backward.
    balance_share = router_losses.step_balance(model, micro_batches, tokens)

    # 3. Forward and backward.
    parts = []
    for index, batch in enumerate(micro_batches):
        sync_gradients(model, last=index == len(micro_batches) - 1)
        loss_sum, measures, router = objective.loss(model, batch, dropout=True)
        share, z = balance_share(router), z_loss(router, tokens)
        (loss_sum / targets.clamp(min=1) + balance_weight * share + z_weight * z).backward()
        sums = (loss_sum, share, z, router.counts.sum(1), router.entropy.sum(1), router.of_images, measures)
        parts.append([x.detach() for x in sums])
    loss_sum, balance, z, counts, entropy, of_images, measures = (
        torch.stack(some).sum(0) for some in zip(*parts, strict=True)
    )

    # 4. Clip by the norm of the whole model's gradient. One host sync a step, so that no bad step is ever taken.
    norm = global_grad_norm(model, {name: held.is_owner for name, held in model.holdings.items()}, model.mesh.world)
    if not norm.isfinite():
        raise NotFinite([bool(loss.isfinite()) for loss, *_ in parts])
    scale = (clip_grad / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_part(p.grad) for p in model.parameters() if p.grad is not None], scale)

    # 5. Change the weights.
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    router_losses.shift_biases(model, counts)
    return StepResult(loss_sum, balance, z, counts, entropy, of_images, measures, targets, tokens, norm)
