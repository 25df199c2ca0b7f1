"""GPUs that are not there: tensors that say they lie on one, mix with no others, and compute on the CPU.

What of the program chooses by device does so as on a GPU, and what forgets to bring a tensor there ends with an error that
names the operator. Speed, memory and NCCL are not shown; kernels in Triton have tests of their own.
"""

import ctypes
import importlib.util
import subprocess
from pathlib import Path

LIBRARIES = ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so")


def build(folder):
    """Compile the library; returns its path, and raises if this machine's compiler cannot."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    include, out = torch / "include", Path(folder, "library.so")
    source = Path(__file__).with_name("library.cpp")
    where = [f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-L{torch}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(out), *where], check=True)
    return out


def load(library):
    """To be called before torch is imported: it looks for a GPU's library once."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    for path in (*(torch / "lib" / name for name in LIBRARIES), library):
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
