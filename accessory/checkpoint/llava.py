"""What config.json of transformers' ``LlavaForConditionalGeneration`` says beside its language model's, a Mixtral."""

from collections.abc import Mapping
from typing import Any

from accessory.console import say
from accessory.errors import UserError
from accessory.model.args import ModelArgs

_VISION = {  # key -> of EncoderArgs, and what transformers takes where it is not said
    "image_size": ("size", 224),
    "patch_size": ("patch", 32),
    "hidden_size": ("dim", 768),
    "intermediate_size": ("hidden_dim", 3072),
    "num_hidden_layers": ("layers", 12),
    "num_attention_heads": ("heads", 12),
    "hidden_act": ("activation", "quick_gelu"),
}
_FIXED: dict[str, Any] = {
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
}


def visual_values(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``visual`` of ModelArgs as plain data. Raises UserError for what this program does not see with."""
    vision = config.get("vision_config") or {}
    expected = {"model_type": "llava", **_FIXED}
    asked = [(key, config.get(key, value), value) for key, value in expected.items()]
    of_tower = {"model_type": "clip_vision_model", "layer_norm_eps": 1e-5}
    asked += [(f"vision_config.{key}", vision.get(key, value), value) for key, value in of_tower.items()]
    for key, value, known in asked:
        if value != known:
            raise UserError(f"{where}: {key} is {value!r}, this program does {known!r}")
    clip = {name: vision.get(key, default) for key, (name, default) in _VISION.items()}
    token = config.get("image_token_index", config.get("image_token_id", 32000))
    return {"preset": "llava", "encoders": [{"kind": "clip", **clip}], "image_token": token}


def description(config: Mapping[str, Any], args: ModelArgs) -> dict[str, Any]:
    """All of config.json, given that of the language model."""
    assert args.visual
    clip, token = args.visual.encoder("clip"), args.visual.image_token
    if token is None:
        token = args.vocab_size - 1
        say(
            f"warning: visual.image_token is not set in config.json: the last of the vocabulary, {token}, is written as the "
            "token that stands for an image"
        )
    kept = {key: config[key] for key in ("tie_word_embeddings", "torch_dtype") if key in config}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": dict(config),
        "vision_config": {"model_type": "clip_vision_model", "layer_norm_eps": 1e-5}
        | {key: getattr(clip, name) for key, (name, _) in _VISION.items()},
        "image_token_index": token,
        "image_seq_length": args.visual.words,
        **_FIXED,
        **kept,
    }
