"""Several answers that are asked for together, on all ranks that hold a model, as they grow."""

from collections.abc import Iterator, Sequence

import torch.distributed as dist

from accessory.errors import UserError
from accessory.infer.engine import Engine
from accessory.infer.prompts import Prompt
from accessory.infer.request import Running
from accessory.infer.sampling import Sampling

States = list[tuple[str, bool]]
"""Of each answer its text so far, and whether it has ended."""


def answers(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, adapter: str | None) -> Iterator[States]:
    """Yield, after each step, how far the answers are; on all ranks, which call this alike, the same.

    Others may use the engine meanwhile, and then this one's answers go on with theirs.

    Raises:
        UserError: one of the prompts cannot be answered, and then none is.
    """
    requests = submit_all(engine, prompts, sampling, adapter)
    if engine.model.mesh.mp.rank:
        engine.waiting.clear()  # the first rank's are the ones that run
        yield from _followed(engine)
        return
    try:
        ended = False
        while not ended:
            if all(request.finish_reason for request in requests):
                engine.beat()  # steps that others made have brought the rest: nothing is left to run, but to be told
            else:
                engine.step()
            states = [(request.text, request.finish_reason is not None) for request in requests]
            ended = all(has_ended for _, has_ended in states)
            yield _share(engine, states)
    finally:
        for request in requests:
            engine.cancel(request)
        engine.close()


def submit_all(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, adapter: str | None) -> list[Running]:
    """Ask for an answer to each, or to none. Raises UserError: one cannot be answered, which it names."""
    requests: list[Running] = []
    for number, prompt in enumerate(prompts):
        try:
            requests.append(engine.submit(prompt.tokens, sampling, adapter, prompt.images))
        except UserError as error:
            for request in requests:
                engine.cancel(request)
            raise UserError(f"prompt {number}: {error}" if len(prompts) > 1 else str(error)) from error
    return requests


def _followed(engine: Engine) -> Iterator[States]:
    follows = True
    try:
        while follows := engine.follow_step():
            yield _share(engine, [])
    finally:  # the caller may not have taken all
        if follows:
            engine.follow()


def _share(engine: Engine, states: States) -> States:
    """``states`` as the first rank has them."""
    shared, mp = [states], engine.model.mesh.mp
    if mp.size > 1:
        dist.broadcast_object_list(shared, group=mp.group, group_src=0)
    return shared[0]
