"""An architecture with the preprocessing that belongs to it, checked before anything is built."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlkit.data.transforms import Preprocess
from vlkit.errors import ModelError, did_you_mean
from vlkit.models import catalogue
from vlkit.models.tokenizers import CLIP_CONTEXT_LENGTH, CLIP_VOCABULARY, tokenizer_id_of

_TOP_KEYS = (
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "quick_gelu",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
    "custom_text",
    "multimodal_cfg",
)
_PREPROCESS_KEYS = ("mode", "mean", "std", "interpolation", "resize_mode", "fill_color")


@dataclass(frozen=True)
class Architecture:
    """What an open_clip model is built from. `model_cfg` has the keys of open_clip's JSON files."""

    name: str
    model_cfg: Mapping[str, Any]
    preprocess: Preprocess

    @property
    def embed_dim(self) -> int:
        """D."""
        return int(self.model_cfg["embed_dim"])

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        size = self.model_cfg["vision_cfg"].get("image_size", 224)
        sides = set(size) if isinstance(size, list | tuple) else {size}
        if len(sides) != 1:
            raise ModelError(f"{self.name} takes images of {size} pixels; only square ones are supported.")
        return int(sides.pop())

    @property
    def context_length(self) -> int:
        """The most tokens a text may have."""
        return int(self.model_cfg["text_cfg"].get("context_length", CLIP_CONTEXT_LENGTH))

    @property
    def patch_dropout(self) -> float:
        """Share of patches left out in training."""
        return float(self.model_cfg["vision_cfg"].get("patch_dropout", 0.0))

    def tokenizer_id(self) -> str:
        """The tokenizer the text configuration asks for."""
        return tokenizer_id_of(self.model_cfg["text_cfg"])

    def record(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "architecture": self.name,
            "model_cfg": self.exported_config(),
            "preprocess_cfg": self.preprocess.to_open_clip(),
        }

    def exported_config(self) -> dict[str, Any]:
        """The `model_cfg` of a `local-dir:` folder, from which plain open_clip builds the same model."""
        return {**copy.deepcopy(dict(self.model_cfg)), "custom_text": True}

    def constructor_arguments(self) -> dict[str, Any]:
        """What open_clip's model class takes. No tower fetches weights of its own from the network."""
        config = copy.deepcopy(dict(self.model_cfg))
        config.pop("custom_text", None)
        if "timm_model_name" in config["vision_cfg"]:
            config["vision_cfg"]["timm_model_pretrained"] = False
        if "hf_model_name" in config["text_cfg"]:
            config["text_cfg"]["hf_model_pretrained"] = False
        return config

    def with_changes(
        self,
        *,
        image_size: int | None = None,
        context_length: int | None = None,
        init_logit_bias: float | None = None,
        patch_dropout: float | None = None,
    ) -> "Architecture":
        """The same architecture with what is not None replaced.

        Raises:
            ModelError: a value that does not fit.
        """
        config = copy.deepcopy(dict(self.model_cfg))
        for section, key, value in (
            ("vision_cfg", "image_size", image_size),
            ("vision_cfg", "patch_dropout", patch_dropout),
            ("text_cfg", "context_length", context_length),
        ):
            if value is not None:
                config[section][key] = value
        if init_logit_bias is not None:
            config["init_logit_bias"] = init_logit_bias
        size = image_size or self.preprocess.size
        changed = replace(self, model_cfg=config, preprocess=replace(self.preprocess, size=size))
        _check_sizes(changed)
        return changed


def resolve_architecture(
    architecture: str | Mapping[str, Any], preprocess: Mapping[str, Any] | None = None, name: str | None = None
) -> Architecture:
    """The architecture of a name or an inline configuration, with its preprocessing.

    Args:
        architecture: a name of open_clip, or a mapping with the keys of its JSON files.
        preprocess: mean, std, interpolation, resize_mode, fill_color; what is missing is OpenAI's.
        name: how messages call an inline configuration.

    Raises:
        ModelError: an unknown name or key, or sizes that do not go together.
    """
    if isinstance(architecture, str):
        name, config = architecture, catalogue.architecture(architecture)
    else:
        name, config = name or "inline", copy.deepcopy(dict(architecture))
    _check_keys(name, config)
    # What a file or tag states besides (its address, its activation) is not preprocessing.
    stated = {key: value for key, value in (preprocess or {}).items() if key in _PREPROCESS_KEYS}
    resolved = Architecture(name, config, Preprocess())
    resolved = replace(resolved, preprocess=Preprocess.from_open_clip({**stated, "size": resolved.image_size}))
    _check_sizes(resolved)
    return resolved


def published_architecture(name: str, tag: str) -> Architecture:
    """An architecture as published weights of it were trained: with their preprocessing and activation.

    open_clip builds by the architecture's name alone and runs OpenAI's weights under `ViT-B-32` with the wrong
    activation, with a warning (its issue 771); here the weights' own record counts.

    Raises:
        ModelError: no such architecture or tag.
    """
    record = catalogue.pretrained_record(name, tag)
    resolved = resolve_architecture(name, record)
    if "quick_gelu" not in record:
        return resolved
    return replace(resolved, model_cfg={**resolved.model_cfg, "quick_gelu": bool(record["quick_gelu"])})


def _check_keys(name: str, config: Mapping[str, Any]) -> None:
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise ModelError(f"Architecture {name} lacks {', '.join(missing)}. It needs embed_dim, vision_cfg, text_cfg.")
    for key in config:
        if key not in _TOP_KEYS:
            raise ModelError(f"Architecture {name} has an unknown key {key!r}. {did_you_mean(key, _TOP_KEYS)}")
    for section in ("vision_cfg", "text_cfg"):
        if not isinstance(config[section], Mapping):
            raise ModelError(f"Architecture {name}: {section} is {config[section]!r}; expected a table of settings.")


def _check_sizes(architecture: Architecture) -> None:
    vision, name = architecture.model_cfg["vision_cfg"], architecture.name
    text = architecture.model_cfg["text_cfg"]
    words = int(text.get("vocab_size", CLIP_VOCABULARY))
    if not text.get("hf_tokenizer_name") and words < CLIP_VOCABULARY:
        raise ModelError(f"{name}: vocab_size {words} is too small for its tokenizer, which has {CLIP_VOCABULARY} ids.")
    if "timm_model_name" in vision:
        return
    size, width = architecture.image_size, int(vision.get("width", 768))
    head = int(vision.get("head_width", 64))
    if isinstance(vision.get("layers", 12), list | tuple):
        if size < 32 or size % 2:
            raise ModelError(f"{name}: image_size {size} does not suit a ResNet: expected an even number from 32 up.")
        return
    patch = int(vision.get("patch_size", 16))
    if size % patch:
        raise ModelError(f"{name}: image_size {size} is no multiple of the patch size {patch}: pixels would be lost.")
    if width % head:
        raise ModelError(f"{name}: vision width {width} is no multiple of head_width {head} (default 64).")
