#!/usr/bin/env python
"""Cut Mistral's consolidated.00.pth for the sparse layout: a slice of every expert on each GPU.

python split_sparse.py                      # beside consolidated.00.pth: writes converted_sparse/
python tools/split_sparse.py SRC DST --mp 4
"""

from accessory.cli import split

if __name__ == "__main__":
    split("mixtral_sparse", "converted_sparse")
