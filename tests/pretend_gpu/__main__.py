"""``python -m pretend_gpu LIBRARY JOBS.json``: run ``accessory`` commands, one after the other, each as ranks of a job."""

import faulthandler
import json
import os
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from pretend_gpu import load

load(sys.argv[1])

import torch  # noqa: E402 (a GPU's library is looked for once, when it is imported)
import torch.distributed as dist  # noqa: E402
from torch.distributed.fsdp._fully_shard import _fsdp_param  # noqa: E402

from accessory import cli  # noqa: E402
from accessory.certify import run  # noqa: E402, F401 (imported once for all)
from accessory.model import attention, triton_here  # noqa: E402
from accessory.parallel.launch import hold_port  # noqa: E402
from accessory.train import loop, model  # noqa: E402, F401
from pretend_gpu import graphs, tensors  # noqa: E402

MEMORY = 2**28
LIMIT_S = 120
"""Seconds that a rank may take."""


@contextmanager
def _nothing(*_):
    yield


def _place():
    return int(os.environ.get("LOCAL_RANK", "0"))


def pretend():
    """Have torch say that there are GPUs; what asks for its library itself is answered here."""
    answers = {
        "is_available": True,
        "device_count": int(os.environ.get("WORLD_SIZE", "1")),
        "get_device_capability": (9, 0),
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "mem_get_info": (MEMORY, MEMORY),
        "get_device_properties": SimpleNamespace(total_memory=MEMORY, multi_processor_count=132),
        "cudart": SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0),
        "current_device": _place(),
        "default_stream": graphs.Idle(),
    } | dict.fromkeys(("synchronize", "set_device", "empty_cache", "set_stream", "_lazy_init"))
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name, stand_in in graphs.CUDA.items():
        setattr(torch.cuda, name, stand_in)
    torch.cuda.Event, torch.cuda.device = graphs.Idle, _nothing
    torch.Tensor.record_stream = lambda self, stream: None
    torch.tensor, torch.Tensor.new_tensor, torch.Tensor.tolist = tensors.tensor, tensors.new_tensor, tensors.tolist
    torch.Tensor.__getitem__, torch.Tensor.__setitem__ = tensors.getitem, tensors.setitem
    attention.varlen_kernel = lambda: tensors.variable_length
    init = dist.init_process_group
    dist.init_process_group = lambda backend, device_id=None, **kwargs: init("gloo", **kwargs)
    _fsdp_param.free_storage = _fsdp_param.alloc_storage = lambda tensor: None  # it has none of its own
    installed = triton_here.is_installed
    triton_here.is_installed = lambda package: package != "triton" and installed(package)
    model.peak_flops = lambda device, dtype: (1e12, "a GPU that is not there")


def run_rank(words, environment, out):
    opened = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    os.environ |= environment
    sys.argv = ["accessory", *words]
    pretend()
    code = 0
    try:
        with tensors.PretendGpu():
            cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int | None) else 1
        if code and code is not end.code:
            print(end.code)
    except BaseException:
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code or 0)


def run_job(words, ranks, files):
    """Returns the ranks' exit codes."""
    processes, held = [], hold_port()
    port = held.getsockname()[1]
    for rank, file in enumerate(files):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = os.fork()
        if not process:
            faulthandler.dump_traceback_later(LIMIT_S, exit=True)
            run_rank(words, {name: str(value) for name, value in place.items()} if ranks > 1 else {}, file)
        processes.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    held.close()
    return codes


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[2]).read_text()):
        codes = run_job(**{name: job[name] for name in ("words", "ranks", "files")})
        Path(job["codes"]).write_text(json.dumps(codes))
