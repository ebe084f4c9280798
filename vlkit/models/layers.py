"""Layers of a tower from its input to its output: for freezing all but the last ones, and for layer-wise rates.

layers_of(encoder, "image")[-1]         # names of the parameters of the last group: the projection
layers_of(encoder, "text")[0]           # the embeddings
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from vlkit.errors import ModelError

Side = Literal["image", "text"]

# open_clip's own towers by the names that the published weights fix.
_INPUT = re.compile(
    r"(class_embedding|positional_embedding|cls_emb|token_embedding|conv\d|bn\d|ln_pre|patch_dropout)\b"
)
_STACK = re.compile(r"transformer\.resblocks\.(\d+)\.|layer(\d+)\.")
_TRANSFORMERS_STACK = re.compile(r"_model\.encoder\.layers\.(\d+)\.")
_LAST_NORM = re.compile(r"(ln_post|ln_final)\b")

# The modules that hold a tower's weights: open_clip's and timm's single one, or those of transformers.
_MODULES: dict[Side, tuple[str, ...]] = {
    "image": ("visual", "vision_model", "visual_projection"),
    "text": ("text", "text_model", "text_projection"),
}


def tower_modules(encoder: nn.Module, side: Side) -> dict[str, nn.Module]:
    """Path in the encoder -> module, of those that hold a tower's weights.

    Raises:
        ModelError: an encoder of another build.
    """
    paths = {path for name in _MODULES[side] for path in (name, f"model.{name}")}
    found = {path: module for path, module in encoder.named_modules() if path in paths}
    if not found:
        raise ModelError(f"{type(encoder).__name__} has no module that is its {side} tower: it cannot be frozen.")
    return found


def layers_of(encoder: nn.Module, side: Side) -> list[list[str]]:
    """Names of a tower's parameters in groups: input, each block (the last with the norm after it), output.

    The groups are those of open_clip's `lock_image_tower`; a tower of timm has the groups timm gives it.

    Args:
        encoder: on open_clip, timm or transformers.
        side: which tower.

    Returns:
        Groups of names as `encoder.named_parameters()` gives them, none empty.

    Raises:
        ModelError: a tower whose layers have no known order.
    """
    modules = tower_modules(encoder, side)
    places: dict[str, int] = {}
    for path, tower in modules.items():
        names = [name for name, _ in tower.named_parameters()]
        own = _of_timm(tower) if hasattr(tower, "trunk") else _of_open_clip(names)
        places |= {f"{path}.{name}": place for name, place in own.items()}
    all_names = [f"{path}.{name}" for path, tower in modules.items() for name, _ in tower.named_parameters()]
    places |= _of_transformers(all_names)
    unknown = [name for name in all_names if name not in places]
    if unknown:
        kinds = " and ".join(type(tower).__name__ for tower in modules.values())
        raise ModelError(
            f"The layers of the {side} tower ({kinds}) have no known order: where does {unknown[0]} belong? Freeze the "
            "whole tower, or train all of it at one learning rate."
        )
    return [[name for name in all_names if places[name] == depth] for depth in sorted(set(places.values()))]


def layer_rates(encoder: nn.Module, decay: float) -> dict[str, float]:
    """Name of a parameter -> decay ** (layers after its own); of both towers.

    Source: Clark et al. 2020, "ELECTRA", arXiv:2003.10555, appendix A (layer-wise learning-rate decay).
    """
    rates: dict[str, float] = {}
    for side in ("image", "text"):
        layers = layers_of(encoder, side)
        for number, names in enumerate(layers):
            rates |= dict.fromkeys(names, decay ** (len(layers) - 1 - number))
    return rates


def freeze(encoder: nn.Module, side: Side, trained_layers: int = 0) -> None:
    """Freeze a tower but for its last `trained_layers` groups.

    Raises:
        ModelError: the tower has fewer groups, or no known order of layers.
    """
    for tower in tower_modules(encoder, side).values():
        tower.requires_grad_(False)
    if not trained_layers:
        return
    layers = layers_of(encoder, side)
    if trained_layers >= len(layers):
        raise ModelError(f"The {side} tower has {len(layers)} layers; {trained_layers} cannot be its last ones only.")
    parameters = dict(encoder.named_parameters())
    for name in (name for layer in layers[-trained_layers:] for name in layer):
        parameters[name].requires_grad_(True)


def _of_open_clip(names: list[str]) -> Mapping[str, int]:
    stack = {name: int(next(filter(None, match.groups()))) for name in names if (match := _STACK.search(name))}
    if not stack:
        return {}
    end = max(stack.values())
    places = dict(stack)
    for name in (name for name in names if name not in stack):
        if _INPUT.match(name):
            places[name] = -1
        elif _LAST_NORM.match(name):
            places[name] = end
        elif re.match(r"(proj|text_projection|attnpool|attn_pool)\b", name):
            places[name] = end + 1
    return places


def _of_transformers(names: list[str]) -> Mapping[str, int]:
    """Full names of CLIPModel's and SiglipModel's parameters; empty for any other model."""
    stack = {name: int(match[1]) for name in names if (match := _TRANSFORMERS_STACK.search(name))}
    end = max(stack.values(), default=0)
    places = dict(stack)
    for name in (name for name in names if stack and name not in stack):
        if re.search(r"_model\.(embeddings|pre_layrnorm)\.", name):
            places[name] = -1
        elif re.search(r"_model\.(post_layernorm|final_layer_norm)\.", name):
            places[name] = end
        elif re.search(r"_model\.head\.|(visual|text)_projection\.", name):
            places[name] = end + 1
    return places


def _of_timm(tower: Any) -> Mapping[str, int]:
    """timm's own order of layers; what open_clip puts behind it comes last."""
    from timm.models import group_parameters

    places = group_parameters(tower.trunk, tower.trunk.group_matcher(coarse=False), reverse=True)
    found = {f"trunk.{name}": int(place) for name, place in places.items()}
    end = max(found.values(), default=-1) + 1
    return found | {name: end for name, _ in tower.named_parameters() if name not in found}
