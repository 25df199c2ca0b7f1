#!/usr/bin/env python
"""A page to ask a visual model one question at a time, about an image.

torchrun --nproc-per-node 2 demos/single_turn_mm.py --pretrained_path SPHINX_MOE
"""

from single_turn import main

if __name__ == "__main__":
    main(__doc__, sees=True)
