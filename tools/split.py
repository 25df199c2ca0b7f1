#!/usr/bin/env python
"""Cut Mistral's consolidated.00.pth for the expert layout: whole experts on each GPU.

python split.py                      # beside consolidated.00.pth: writes converted/
python tools/split.py SRC DST --mp 4
"""

from accessory.cli import split

if __name__ == "__main__":
    split("mixtral", "converted")
