"""The config.json of transformers' ``LlavaForConditionalGeneration`` whose language model is a Mixtral."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accessory.console import say
from accessory.errors import UserError
from accessory.model.args import ModelArgs
from accessory.model.visual import EncoderKind, PresetName

_SIZES = {  # key of vision_config -> field of EncoderArgs
    "image_size": "size",
    "patch_size": "patch",
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
}


@dataclass(frozen=True)
class _Tower:
    """transformers' name of an encoder, and its defaults for keys that config.json leaves out.

    Attributes:
        fixed: the values of ``vision_config`` that this program implements. strategy: which of the encoder's tokens are
            used, as ``vision_feature_select_strategy``.
    """

    model_type: str
    preset: PresetName
    defaults: dict[str, Any]
    fixed: dict[str, Any]
    strategy: str


_BASE = {"size": 224, "dim": 768, "hidden_dim": 3072, "layers": 12, "heads": 12}
_TOWERS: dict[EncoderKind, _Tower] = {
    "clip": _Tower(
        "clip_vision_model",
        "llava",
        _BASE | {"patch": 32, "activation": "quick_gelu"},
        {"layer_norm_eps": 1e-5},
        "default",  # all but the class token
    ),
    "siglip": _Tower(
        "siglip_vision_model",
        "llava_siglip",
        _BASE | {"patch": 16},
        {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
        "full",
    ),
}
_FIXED: dict[str, Any] = {
    "vision_feature_layer": -2,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
}


def visual_values(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``visual`` of ModelArgs as plain data. Raises UserError for anything that this program does not implement."""
    vision = config.get("vision_config") or {}
    kinds: dict[str, EncoderKind] = {tower.model_type: kind for kind, tower in _TOWERS.items()}
    named = vision.get("model_type", "clip_vision_model")
    if named not in kinds:
        raise UserError(f"{where}: vision_config.model_type is {named!r}, this program does {' and '.join(kinds)}")
    kind = kinds[named]
    tower = _TOWERS[kind]
    expected = {"model_type": "llava", **_FIXED}
    asked = [(key, config.get(key, value), value) for key, value in expected.items()]
    strategy = config.get("vision_feature_select_strategy", "default")
    asked.append(("vision_feature_select_strategy", strategy, tower.strategy))
    asked += [(f"vision_config.{key}", vision.get(key, value), value) for key, value in tower.fixed.items()]
    for key, value, known in asked:
        if value != known:
            raise UserError(f"{where}: {key} is {value!r}, this program does {known!r}")
    sizes = {name: vision.get(key, tower.defaults[name]) for key, name in _keys(tower).items()}
    token = config.get("image_token_index", config.get("image_token_id", 32000))
    return {"preset": tower.preset, "encoders": [{"kind": kind, **sizes}], "image_token": token}


def _keys(tower: _Tower) -> dict[str, str]:
    """The keys of ``vision_config`` and the fields of EncoderArgs for them."""
    return _SIZES | ({"hidden_act": "activation"} if "activation" in tower.defaults else {})


def description(config: Mapping[str, Any], args: ModelArgs) -> dict[str, Any]:
    """The whole config.json, from that of the language model."""
    assert args.visual
    (kind,), token = args.visual.kinds, args.visual.image_token
    encoder, tower = args.visual.encoder(kind), _TOWERS[kind]
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
        "vision_config": {"model_type": tower.model_type, **tower.fixed}
        | {key: getattr(encoder, name) for key, name in _keys(tower).items()}
        | ({"vision_use_head": False} if kind == "siglip" else {}),
        "image_token_index": token,
        "image_seq_length": args.visual.words,
        "vision_feature_select_strategy": tower.strategy,
        **_FIXED,
        **kept,
    }
