"""``python -m accessory``: the same command as ``accessory``, for torchrun and srun to launch."""

from accessory.cli import main

main()
