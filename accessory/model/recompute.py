"""Activation recompute: what a block keeps for its backward pass, and what backward computes again (``parallel.recompute``).

    none                autograd keeps everything that backward reads
    norms_and_experts   backward recomputes what needs no matrix product and only inputs that are kept anyway: the outputs of
                        norms, the experts' rows of them, and the input of the down projection
    block               only the block's input is kept, and the block runs again in backward. Its decisions (which experts,
                        and where their rows lie) are kept, and what only its output needs is not computed again

A module calls ``made_again`` on what it can recompute and ``decided`` on a decision, and asks ``is_rerun``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from accessory.settings import Recompute

T = TypeVar("T")


def run_block(block: Callable[..., T], arguments: tuple[Any, ...], recompute: Recompute) -> T:
    """``block(*arguments)``, keeping for backward what ``recompute`` says."""
    if recompute == "none" or not torch.is_grad_enabled():
        return block(*arguments)
    if recompute == "norms_and_experts":
        with _making_again():
            return block(*arguments)
    first = _Run([], is_rerun=False)
    rerun = _Run(first.decisions, is_rerun=True)
    return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (first, rerun))


class _Run:
    """A pass over a block that runs twice, the second time in backward."""

    def __init__(self, decisions: list[Any], is_rerun: bool):
        self.decisions, self.is_rerun, self.next = decisions, is_rerun, 0
        self._token: Token[_Run | None] | None = None

    def __enter__(self) -> None:
        self._token, self.next = _run.set(self), 0

    def __exit__(self, *_: object) -> None:
        assert self._token
        _run.reset(self._token)


_run: ContextVar[_Run | None] = ContextVar("run", default=None)


def is_rerun() -> bool:
    """Whether this is a block's second run, in backward: what it saves is needed, its output is not."""
    run = _run.get()
    return run is not None and run.is_rerun


def decided(decide: Callable[[], T]) -> T:
    """``decide()``; in a block's second run, the result of the first.

    A product that is not bitwise the same the second time must not send a token to another expert, and the host waits only
    once for what it counts. ``decide`` does nothing that autograd sees.
    """
    run = _run.get()
    if run is None:
        return decide()
    if not run.is_rerun:
        run.decisions.append(decide())
    run.next += 1
    return run.decisions[run.next - 1]


class _Again:
    """A tensor that is made when it is first asked for, and freed when all who keep it have asked."""

    def __init__(self, make: Callable[[], Tensor]):
        self.make, self.kept_by = make, 0
        self._tensor: Tensor | None = None

    def peek(self) -> Tensor:
        if self._tensor is None:
            self._tensor = self.make()
        return self._tensor

    def take(self) -> Tensor:
        tensor = self.peek()
        self.kept_by -= 1
        if self.kept_by <= 0:
            self._tensor = None
        return tensor


_Makers = dict[int, tuple[Tensor, _Again]]
"""By its storage, a tensor of the block that runs (which therefore stays until it has), and what makes it again."""
_makers: ContextVar[_Makers | None] = ContextVar("makers", default=None)


def made_again(tensor: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """``tensor``; backward may get ``make(*sources)`` instead, which must be the same bit for bit, with the same strides.

    The sources are tensors that backward keeps anyway, or that are recomputed themselves.
    """
    makers = _makers.get()
    if makers is not None:
        found = [makers[_storage(each)][1].peek if _storage(each) in makers else each.detach for each in sources]
        makers[_storage(tensor)] = (tensor, _Again(lambda: make(*(get() for get in found))))
    return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _making_again() -> Iterator[None]:
    makers: _Makers = {}

    def pack(tensor: Tensor) -> Any:
        if _storage(tensor) not in makers:
            return tensor
        again = makers[_storage(tensor)][1]
        again.kept_by += 1
        return again, tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        again, *where = kept
        return again.take().as_strided(*where)

    token = _makers.set(makers)
    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _makers.reset(token)
        makers.clear()  # autograd keeps ``pack``
