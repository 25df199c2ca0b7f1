"""Install megablocks into this Python: without its pins, which no current torch meets, and without its CUDA extension, in
whose place ``accessory/model/moe/kernels/megablocks_ops.py`` stands. ``make megablocks`` runs this.

Its setup.py compiles the extension wherever torch finds nvcc, which fails with CUDA 13: it is shown a torch that finds none.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

WITHOUT_CUDA = {
    "torch/__init__.py": "__version__ = 'none'\n",
    "torch/utils/__init__.py": "",
    "torch/utils/cpp_extension.py": "CUDA_HOME = BuildExtension = CUDAExtension = None\n",
}

with tempfile.TemporaryDirectory() as name:
    for file, text in WITHOUT_CUDA.items():
        path = Path(name, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "megablocks==0.10.0"]
    sys.exit(subprocess.run(pip, env=os.environ | {"PYTHONPATH": name}).returncode)
