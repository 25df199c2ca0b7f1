"""The training step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from accessory.data.loader import Batch
from accessory.errors import UserError
from accessory.model.decoder import Decoder, Targets
from accessory.parallel.fsdp import DataParallel, global_grad_norm, local_part, sync_gradients
from accessory.parallel.tensor import get_data_parallel_group
from accessory.train.balance import document_balance, global_balance


@dataclass(frozen=True)
class StepResult:
    """What a step did, on the device. Sums are this rank's, to be added over data-parallel ranks when they are logged."""

    loss_sum: Tensor  # cross-entropy over this rank's targets
    balance: Tensor  # this rank's share of the balance loss
    counts: Tensor  # [L, E] rows this rank routed to each expert
    targets: Tensor  # targets of the whole global batch
    tokens: Tensor  # real tokens of the whole global batch
    grad_norm: Tensor  # before clipping, of the whole model


def train_step(
    model: Decoder,
    optimizer: Optimizer,
    micro_batches: Sequence[Batch],
    *,
    clip_grad: float,
    balance: Literal["global", "document"],
    data_parallel: DataParallel,
    cut: set[str],
) -> StepResult:
    """One optimiser step over a global batch: ``micro_batches`` of every data-parallel rank.

    loss = cross-entropy / targets + load_balancing_weight * balance loss, each over the whole global batch.

    Args:
        cut: names of the parameters that are cut over model-parallel ranks.

    Raises:
        UserError: the loss or gradient is not finite; on all ranks together, before any weight has changed.
    """
    device = micro_batches[0].tokens.device
    group = get_data_parallel_group()
    ranks = dist.get_world_size(group)
    weight, top_k = model.args.load_balancing_weight, model.args.moe.num_experts_per_tok

    # 1. How much there is in the whole global batch: a mean of means would depend on how it is cut.
    totals = torch.tensor([[b.target_tokens, b.real_tokens] for b in micro_batches], device=device).sum(0)
    dist.all_reduce(totals, group=group)
    targets, tokens = totals

    # 2. Its experts' loads, where the balance loss needs them before the first backward.
    per_document = balance == "document" or not weight  # a loss without weight is only reported: the free way
    loads = None
    if not per_document and len(micro_batches) > 1:
        loads = count_loads(model, micro_batches)

    # 3. Forward and backward. FSDP averages gradients over data-parallel ranks; here they must be summed.
    loss_sum = torch.zeros((), device=device)
    balance_sum = torch.zeros((), device=device)
    counts = torch.zeros(model.args.n_layers, model.args.moe.num_experts, dtype=torch.int64, device=device)
    for number, batch in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        sync_gradients(model, last or data_parallel == "fsdp")  # fsdp never holds whole gradients; the others add up
        loss, stats = model(*batch.inputs(), keys=batch.keys)
        batch_counts = stats.counts.sum(1)
        if per_document:
            share = document_balance(stats, tokens, top_k)
        else:
            share = global_balance(stats, _summed(batch_counts) if loads is None else loads, tokens, top_k)
        ((loss / targets.clamp(min=1) + weight * share) * ranks).backward()
        loss_sum, balance_sum, counts = loss_sum + loss.detach(), balance_sum + share.detach(), counts + batch_counts

    # 4. Clip by the norm of the whole model's gradient. One host sync a step, so that no bad step is ever taken.
    parameters = dict(model.named_parameters())
    norm = global_grad_norm(parameters, cut)
    if not norm.isfinite():
        raise UserError("the loss or its gradient is not finite; no weight was changed. Lower optim.lr, or look at the data")
    scale = (clip_grad / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_part(p.grad) for p in parameters.values() if p.grad is not None], scale)

    # 5. Change the weights.
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss_sum, balance_sum, counts, targets, tokens, norm)


@torch.no_grad()
def count_loads(model: Decoder, micro_batches: Sequence[Batch]) -> Tensor:
    """Rows routed to each expert [L, E] in the whole global batch: a forward of every micro-batch without the output."""
    nothing = torch.zeros(0, dtype=torch.int64, device=micro_batches[0].tokens.device)
    counts = [model(b.tokens, b.documents, Targets(nothing, nothing), keys=b.keys)[1].counts.sum(1) for b in micro_batches]
    return _summed(torch.stack(counts).sum(0))


def _summed(x: Tensor) -> Tensor:
    """The sum over data-parallel ranks."""
    x = x.clone()
    dist.all_reduce(x, group=get_data_parallel_group())
    return x
