"""CLIP models between open_clip's and transformers' layout: names of tensors, configuration, files beside them.

Both hold the same numbers. open_clip keeps query, key and value of a block in one matrix and the projections as
(W,D) parameters; transformers has three layers and (D,W) linear layers.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlkit.data.transforms import Preprocess
from vlkit.errors import ModelError
from vlkit.models.architecture import Architecture
from vlkit.models.tokenizers import CLIP_BPE, CLIP_VOCABULARY, get_tokenizer

START_TOKEN, END_TOKEN = CLIP_VOCABULARY - 2, CLIP_VOCABULARY - 1
_START, _END = "<|startoftext|>", "<|endoftext|>"  # as transformers spells them

# open_clip's custom-text names to transformers', outside the blocks.
_NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "text.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text.ln_final.weight": "text_model.final_layer_norm.weight",
    "text.ln_final.bias": "text_model.final_layer_norm.bias",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text.text_projection": "text_projection.weight"}
_TOWERS = {"visual": "vision_model", "text": "text_model"}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_BLOCK = re.compile(r"(visual|text)\.transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
_STACKED = re.compile(r"(visual|text)\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def weights_to_hf(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under open_clip's custom-text names to those of a CLIPModel.

    Raises:
        ModelError: a tensor that a CLIPModel has no place for.
    """
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name in _NAMES:
            out[_NAMES[name]] = value.reshape(()) if name == "logit_scale" else value
        elif name in _TRANSPOSED:
            out[_TRANSPOSED[name]] = value.T.contiguous()
        elif match := _STACKED.fullmatch(name):
            tower, block, kind = match.groups()
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                out[f"{_TOWERS[tower]}.encoder.layers.{block}.self_attn.{letter}_proj.{kind}"] = part.contiguous()
        elif (match := _BLOCK.fullmatch(name)) and match[3] in _IN_BLOCK:
            tower, block, part_name, kind = match.groups()
            out[f"{_TOWERS[tower]}.encoder.layers.{block}.{_IN_BLOCK[part_name]}.{kind}"] = value
        elif name != "text.attn_mask":
            raise ModelError(f"A CLIPModel of transformers has no place for {name} {tuple(value.shape)}.")
    return out


def weights_from_hf(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `weights_to_hf`.

    Raises:
        ModelError: a tensor that is not one of a plain CLIPModel.
    """
    plain = {theirs: ours for ours, theirs in _NAMES.items()}
    turned = {theirs: ours for ours, theirs in _TRANSPOSED.items()}
    towers = {theirs: ours for ours, theirs in _TOWERS.items()}
    in_block = {theirs: ours for ours, theirs in _IN_BLOCK.items()}
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        match = re.fullmatch(r"(vision_model|text_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in plain:
            out[plain[name]] = value
        elif name in turned:
            out[turned[name]] = value.T.contiguous()
        elif match and match[3] in in_block:
            out[f"{towers[match[1]]}.transformer.resblocks.{match[2]}.{in_block[match[3]]}.{match[4]}"] = value
        elif match and match[3] == "self_attn.q_proj":
            parts = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            out[f"{towers[match[1]]}.transformer.resblocks.{match[2]}.attn.in_proj_{match[4]}"] = torch.cat(parts)
        elif not (match and match[3] in ("self_attn.k_proj", "self_attn.v_proj")) and "position_ids" not in name:
            raise ModelError(f"open_clip's CLIP has no place for {name} {tuple(value.shape)}.")
    return out


def config_to_hf(architecture: Architecture) -> dict[str, Any]:
    """The config.json of the CLIPModel that computes what this architecture does.

    Raises:
        ModelError: a CLIPModel cannot compute it; the message says what stands in the way.
    """
    vision, text = architecture.model_cfg["vision_cfg"], architecture.model_cfg["text_cfg"]
    problem = _not_plain(architecture)
    if problem:
        raise ModelError(
            f"{architecture.name} cannot be written for transformers: it has {problem}. A CLIPModel holds open_clip's "
            "plain ViT with a class token and its causal text transformer. Keep open_clip's layout instead."
        )
    act = "quick_gelu" if architecture.model_cfg.get("quick_gelu") else "gelu"
    width = int(vision.get("width", 768))
    words = int(text.get("width", 512))
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": architecture.embed_dim,
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": architecture.image_size,
            "patch_size": int(vision.get("patch_size", 16)),
            "projection_dim": architecture.embed_dim,
            **_tower(width, vision, 12, width // int(vision.get("head_width", 64)), act),
        },
        "text_config": {
            "model_type": "clip_text_model",
            "max_position_embeddings": architecture.context_length,
            "vocab_size": CLIP_VOCABULARY,
            "bos_token_id": START_TOKEN,
            "eos_token_id": END_TOKEN,
            "pad_token_id": END_TOKEN,
            "projection_dim": architecture.embed_dim,
            **_tower(words, text, 12, int(text.get("heads", 8)), act),
        },
    }


def config_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `model_cfg` of open_clip that computes what a CLIPModel with this configuration does.

    Raises:
        ModelError: open_clip's CLIP cannot compute it.
    """
    vision, text = config["vision_config"], config["text_config"]
    act = vision["hidden_act"]
    if act not in ("quick_gelu", "gelu") or text["hidden_act"] != act or text["vocab_size"] != CLIP_VOCABULARY:
        raise ModelError(
            f"This CLIPModel has activations {act} and {text['hidden_act']} and {text['vocab_size']} token ids; "
            f"open_clip's CLIP takes quick_gelu or gelu in both towers and {CLIP_VOCABULARY} ids."
        )
    return {
        "embed_dim": config["projection_dim"],
        "quick_gelu": act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["hidden_size"],
            "layers": vision["num_hidden_layers"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": CLIP_VOCABULARY,
            "width": text["hidden_size"],
            "layers": text["num_hidden_layers"],
            "heads": text["num_attention_heads"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        },
    }


def processor_to_hf(architecture: Architecture) -> dict[str, Any]:
    """The preprocessor_config.json of transformers' CLIPImageProcessor.

    Raises:
        ModelError: images are padded to a square, which that processor cannot do.
    """
    if architecture.preprocess.resize_mode == "longest":
        raise ModelError(f"{architecture.name} pads images to a square; transformers' CLIP processor cannot.")
    return processor_of(architecture.preprocess, "clip")


def processor_of(preprocess: Preprocess, model_type: str) -> dict[str, Any]:
    """The preprocessor_config.json of transformers for an image model; `preprocess_of` reads it back.

    Args:
        preprocess: one that does not pad.
        model_type: clip or siglip.
    """
    size, whole = preprocess.size, int(preprocess.size / preprocess.crop_pct + 1e-6)
    shortest = preprocess.resize_mode == "shortest"
    record = {
        "image_processor_type": {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}[model_type],
        "do_resize": True,
        "size": {"shortest_edge": whole} if shortest else {"height": whole, "width": whole},
        "resample": {"bilinear": 2, "bicubic": 3}[preprocess.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
    if not shortest and whole == size:
        return {**record, "do_center_crop": False}
    return {**record, "do_center_crop": True, "crop_size": {"height": size, "width": size}}


def write_clip_tokenizer(folder: Path, context_length: int) -> None:
    """OpenAI's vocabulary in the files transformers' CLIPTokenizer reads."""
    bpe: Any = get_tokenizer(CLIP_BPE)._bpe  # type: ignore[attr-defined]
    spelling = {START_TOKEN: _START, END_TOKEN: _END}
    vocabulary = {spelling.get(number, word): number for word, number in bpe.encoder.items()}
    merges = [" ".join(pair) for pair, _ in sorted(bpe.bpe_ranks.items(), key=lambda item: item[1])]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "do_lower_case": True, **special}
    for name, value in (("special_tokens_map.json", special), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tower(width: int, cfg: Mapping[str, Any], layers: int, heads: int, act: str) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": int(width * float(cfg.get("mlp_ratio", 4.0))),
        "num_hidden_layers": int(cfg.get("layers", layers)),
        "num_attention_heads": heads,
        "hidden_act": act,
        "layer_norm_eps": 1e-5,
    }


# Keys that may be set without changing what the tower computes, or that `config_to_hf` carries over.
_PLAIN_VISION = {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "patch_dropout"}
_PLAIN_TEXT = {"context_length", "vocab_size", "width", "layers", "heads", "mlp_ratio"}
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "pool_type": ("tok", "argmax", "eos"),
    "ls_init_value": (None,),
    "attentional_pool": (False, None),
    "no_ln_pre": (False,),
    "final_ln_after_pool": (False,),
    "proj_bias": (False,),
    "embed_cls": (False,),
    "no_causal_mask": (False,),
    "output_tokens": (False, True),
    "init_logit_scale": (None,),
}


def _not_plain(architecture: Architecture) -> str | None:
    config = architecture.model_cfg
    if architecture.tokenizer_id() != CLIP_BPE:
        return f"the tokenizer {architecture.tokenizer_id()}"
    if config.get("init_logit_bias") is not None:
        return "a logit_bias (it was trained with a sigmoid loss)"
    if "multimodal_cfg" in config:
        return "a decoder (CoCa)"
    for section, plain in (("vision_cfg", _PLAIN_VISION), ("text_cfg", _PLAIN_TEXT)):
        for key, value in config[section].items():
            if key in plain and not isinstance(value, list | tuple):
                continue
            if value not in _HARMLESS.get(key, (None, False)):
                return f"{section}.{key} = {value!r}"
    return None
