"""The import path of LLaMA2-Accessory's users: ``from accessory.model.meta import MetaModel``."""

from accessory.infer.meta import MetaModel

__all__ = ["MetaModel"]
