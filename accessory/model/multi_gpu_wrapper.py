"""The import path of the reference project: ``from accessory.model.multi_gpu_wrapper import MultiGpuWrapper``."""

from accessory.infer.workers import MultiGpuWrapper

__all__ = ["MultiGpuWrapper"]
