"""``python -m accessory``: the same command as ``accessory``, for torchrun and srun to launch."""

from accessory.cli import main

if __name__ == "__main__":  # not in the processes that tokenise
    main()
