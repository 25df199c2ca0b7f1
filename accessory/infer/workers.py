"""A model in several processes of this machine, used from one that is none of them, as a notebook is."""

import itertools
import pickle
import tempfile
import threading
import traceback
import weakref
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map
from tqdm import tqdm

from accessory.data.tokenizer import Tokenizer
from accessory.errors import UserError
from accessory.infer.meta import MetaModel
from accessory.parallel.forkserver import Killed, Worker, end_with_parent, fork_server, start, why_gone
from accessory.parallel.launch import Launch, join

GRACE_S = 10.0
"""How long the others have to answer as well when one has failed: without it they may wait for ever."""
NEXT, END = "next of the stream", "end of the stream"


class MultiGpuWrapper:
    """A ``MetaModel`` that several processes hold together, each on its GPU (without any, on the CPU); also a context.

        with MultiGpuWrapper("DIR", gpus=4, llama_type="mixtral_sparse") as model:
            model.generate(["..."], max_gen_len=128)

    Its methods are those of ``MetaModel``; tensors come back on the CPU. A script has what it does under
    ``if __name__ == "__main__":``, for the processes import it.

    Attributes:
        tokenizer: the model's.
    """

    def __init__(
        self,
        *from_pretrained_args: Any,
        gpus: int | None = None,
        gpu_ids: Sequence[int] | None = None,
        **from_pretrained_kwargs: Any,
    ):
        """
        Args:
            from_pretrained_args, from_pretrained_kwargs: of ``MetaModel.from_pretrained``, without ``mp_group``.
            gpus: how many. gpu_ids: which; one of the two is given.

        Raises:
            UserError: there are no such GPUs, or the model cannot be loaded so.
        """
        if (gpus is None) == (gpu_ids is None):
            raise UserError("give either gpus, how many hold the model, or gpu_ids, which")
        ids = list(range(gpus or 0)) if gpu_ids is None else list(gpu_ids)
        count = torch.cuda.device_count()
        if not ids or (count and not set(ids) <= set(range(count))):
            raise UserError(f"the model cannot be held by GPUs {ids}; this machine has {count}")
        folder = tempfile.TemporaryDirectory(prefix="accessory-")
        self._workers: list[Worker] = []
        self._end = weakref.finalize(self, _end, self._workers, folder)
        self._numbers = itertools.count()
        store = str(Path(folder.name, "store"))
        for rank in range(len(ids)):
            place = Launch(rank, len(ids), ids[rank], len(ids))
            setup = partial(_Rank, place, store, from_pretrained_args, from_pretrained_kwargs)
            self._workers.append(start(fork_server("accessory.infer.meta"), setup))
        try:
            self.tokenizer: Tokenizer = self._call("tokenizer")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "MultiGpuWrapper":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        self._end()

    def generate(self, *args: Any, **kwargs: Any) -> list[str]:
        return self._call("generate", *args, **kwargs)

    def chat(self, *args: Any, **kwargs: Any) -> list[str]:
        return self._call("chat", *args, **kwargs)

    def stream_generate(self, *args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        """As MetaModel's; another call ends it."""
        number = self._call("stream_generate", *args, **kwargs)
        try:
            while (step := self._call(NEXT, number)) is not None:
                yield step
        finally:
            if self._end.alive:
                self._call(END, number)

    def compute_logits(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        return self._call("compute_logits", *args, **kwargs)

    def evaluate_examples(self, *args: Any, **kwargs: Any) -> dict[str, list[Any]]:
        return self._call("evaluate_examples", *args, **kwargs)

    def classify(self, *args: Any, **kwargs: Any) -> list[dict[str, float]]:
        return self._call("classify", *args, **kwargs)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """What the first process returns of a call of all of them.

        Raises:
            UserError: a process is gone; then all are. Exception: what the call raised.
        """
        if not self._end.alive:
            raise UserError("this MultiGpuWrapper is closed: make another one")
        number = next(self._numbers)
        for worker in self._workers:
            try:
                worker.pipe.send((number, name, args, kwargs))
            except OSError:
                self._lost(worker)
        awaited: dict[Any, Worker] = {worker.pipe: worker for worker in self._workers}
        result: Any = None
        error: BaseException | None = None
        while awaited:
            ready = wait(list(awaited), None if error is None else GRACE_S)
            if not ready:
                self.close()
                break
            for pipe in ready:
                worker = awaited[pipe]
                try:
                    reply, failed = worker.pipe.recv()
                except (EOFError, OSError):
                    self._lost(worker)
                answered, found, raised = (number, None, failed) if reply is None else pickle.loads(reply)
                if answered != number:  # of a call that Ctrl-C has ended here
                    continue
                del awaited[pipe]
                error = error or raised
                result = found if worker is self._workers[0] else result
        if error is not None:
            raise error
        return result

    def _lost(self, worker: Worker) -> NoReturn:
        rank, count, why = self._workers.index(worker), len(self._workers), why_gone(worker)
        self.close()
        told = "it was killed, perhaps for lack of memory" if isinstance(why, Killed) else str(why)
        raise UserError(
            f"process {rank} of the {count} that hold the model is gone, so that all have ended ({told}): make another "
            "MultiGpuWrapper"
        )


def _end(workers: list[Worker], folder: tempfile.TemporaryDirectory[str]) -> None:
    for worker in workers:
        worker.pipe.close()
    for worker in workers:
        worker.process.kill()
        worker.process.join()
    folder.cleanup()


class _Rank:
    """One of the processes: it does what it is told, as all of them are."""

    def __init__(self, place: Launch, store: str, args: Sequence[Any], kwargs: dict[str, Any]):
        threading.Thread(target=end_with_parent, daemon=True).start()
        tqdm.set_lock(threading.RLock())  # its own is a semaphore between processes, which a killed one would leave behind
        join(place, dist.FileStore(store, place.world))
        self.model = MetaModel.from_pretrained(*args, **kwargs | {"mp_group": dist.group.WORLD})
        self.is_first = place.rank == 0
        self.stream: Generator[Any, None, None] = (step for step in list[Any]())  # nobody's
        self.stream_number = -1

    def __call__(self, call: tuple[int, str, Sequence[Any], dict[str, Any]]) -> bytes:
        """(number of the call, result, exception), pickled: plainly, for tensors are to be copied."""
        number, name, args, kwargs = call
        result = error = None
        try:
            result = tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, self._do(number, name, args, kwargs))
        except Exception as raised:
            error = raised
            if not isinstance(error, UserError):
                error.add_note(traceback.format_exc())
        return pickle.dumps((number, result if self.is_first else None, error))

    def _do(self, number: int, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if name in (NEXT, END) and args[0] != self.stream_number:  # another call has ended that stream
            return None
        if name == NEXT:
            return next(self.stream, None)
        self.stream.close()
        if name == END:
            return None
        found = getattr(self.model, name)
        result = found(*args, **kwargs) if callable(found) else found
        if not isinstance(result, Generator):
            return result
        self.stream, self.stream_number = result, number
        return number
