"""A new model on an image tower that timm has trained: what LiT starts from.

    tower = {"timm_model_name": "vit_base_patch16_224", "timm_pool": "token", "timm_proj": "linear", "image_size": 224}
    lit = {"embed_dim": 512, "vision_cfg": tower, "text_cfg": {"width": 512, "heads": 8, "layers": 12}}
    encoder = with_trained_tower(lit, "timm:vit_base_patch16_224.augreg_in21k")

The text tower and the projection of the image tower have random weights.
"""

from collections.abc import Mapping
from typing import Any

import torch

from vlkit.errors import ModelError
from vlkit.models.architecture import resolve_architecture
from vlkit.models.open_clip_encoder import OpenClipEncoder, build_encoder
from vlkit.models.timm_encoder import load_timm
from vlkit.models.weight_files import differences


def with_trained_tower(
    architecture: str | Mapping[str, Any], name: str, *, image_size: int | None = None
) -> OpenClipEncoder:
    """An encoder with random weights but for its image tower, and with the mean and std of that tower's weights.

    Args:
        architecture: a name of open_clip or an inline one, whose image tower is this timm model.
        name: `timm:NAME.TAG`, or `timm:NAME@FILE` for weights on disk.
        image_size: side of the square input in pixels; default the architecture's.

    Raises:
        ModelError: no such model or weights, or the architecture's image tower is another one; what differs is listed.
        CheckpointError: a file that is cut, or belongs to another model.
    """
    scheme, _, rest = name.partition(":")
    if scheme != "timm" or not rest:
        raise ModelError(f"model.init_image is {name!r}; expected timm:NAME.TAG, or timm:NAME@FILE.")
    resolved = resolve_architecture(architecture)
    expected = resolved.model_cfg["vision_cfg"].get("timm_model_name")
    if expected is None:
        raise ModelError(
            f"model.init_image = {name!r}: the image tower of {resolved.name} is open_clip's own. Name timm's in "
            f"vision_cfg: timm_model_name = {rest.partition('@')[0].partition('.')[0]!r}, timm_proj = 'linear'."
        )
    trained = load_timm(rest, image_size or resolved.image_size)
    encoder = build_encoder(architecture, image_size=image_size, preprocess=trained.preprocess.to_open_clip())
    visual: Any = encoder.model.visual
    own, found = visual.trunk.state_dict(), trained.weights()
    wrong = differences(found=found, expected=own)
    if wrong:
        raise ModelError(
            f"model.init_image = {name!r} does not fit the image tower {expected} of {resolved.name}: {wrong}. Name "
            "the same model in vision_cfg.timm_model_name; its timm_pool decides which of its norms there are."
        )
    with torch.no_grad():
        visual.trunk.load_state_dict(found)
    return encoder
