#!/usr/bin/env python
"""A chat page for a visual model. The model runs in processes of its own, one for each GPU.

python demos/multi_turn_mm.py --n_gpus 2 --pretrained_path SPHINX_MOE
"""

from multi_turn import main

if __name__ == "__main__":
    main(__doc__, sees=True)
