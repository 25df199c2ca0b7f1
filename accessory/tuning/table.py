"""The table of trained parameters that a run prints before the first step."""

import torch

from accessory.model.decoder import Decoder
from accessory.tuning.spec import PRESETS, matches


def tuning_table(model: Decoder) -> str:
    """The trained parameters by group, with their share of the model and their dtype, and the number of frozen ones."""
    sizes = model.logical.sizes
    total = sum(sizes.values())
    groups: dict[tuple[str, torch.dtype], int] = {}
    for name, parameter in (*model.named_parameters(), *model.offloaded_tensors()):
        key = (_group(name) if parameter.requires_grad else "frozen", parameter.dtype)
        groups[key] = groups.get(key, 0) + sizes[name]
    frozen = {key: groups.pop(key) for key in list(groups) if key[0] == "frozen"}
    rows = [(group, count, str(dtype)) for (group, dtype), count in groups.items()]
    rows += [("all that trains", sum(groups.values()), "")]
    rows += [(group, count, str(dtype)) for (group, dtype), count in frozen.items()]
    lines = [f"{'what trains':24s}{'parameters':>18s}{'share':>10s}  dtype"]
    lines += [
        f"{group:24s}{count:18,d}{count / total:10.3%}  {dtype.removeprefix('torch.')}" for group, count, dtype in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _group(name: str) -> str:
    """``layers.0.attention.wq.lora_a`` -> ``attention LoRA``."""
    preset = next(preset for preset in PRESETS if matches(preset, name))
    if name.endswith(("lora_a", "lora_b")):
        return f"{preset} LoRA"
    return f"{preset} bias" if name.endswith("bias") else preset
