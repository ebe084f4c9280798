"""Image towers of timm behind the DualEncoder interface, for what needs no text: probes, kNN, image retrieval.

    load_embedder("timm:vit_small_patch14_dinov2.lvd142m").embed_images(paths)     # (N,D)

The only file that imports timm. Preprocessing is what timm records of the weights.
"""

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch.nn.functional as F
from torch import Tensor, nn

from vlkit.data.transforms import Preprocess
from vlkit.errors import CheckpointError, ConfigError, ModelError, did_you_mean
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.tokenizers import NO_TEXT, TextTokenizer
from vlkit.models.tower import TextTower, VisionTower
from vlkit.models.weight_files import differences, read_any_weights

_RESIZE_MODES = {"center": "shortest", "squash": "squash"}


class TimmEncoder(DualEncoder):
    """An image tower of timm, pooled as it was trained, without its classifier. `load_timm` makes one.

    Args:
        model: a timm model with `num_classes=0`.
        name: timm's name of it.
        preprocess: what timm records of its weights.
    """

    def __init__(self, model: nn.Module, name: str, preprocess: Preprocess) -> None:
        untyped: Any = model
        super().__init__(
            # Of a few families the last hidden layer of the classifier stays and is wider than the features.
            embed_dim=int(getattr(untyped, "head_hidden_size", None) or untyped.num_features),
            image_size=preprocess.size,
            preprocess=preprocess,
            tokenize=TextTokenizer(NO_TEXT, 0),
            gives=frozenset({"image"}),
        )
        self.model = model
        self.name = name

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """Images (B,3,H,W) uint8, or float in [0,1] -> (B,D)."""
        features: Tensor = self.model(self.normalize_pixels(images))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Raises ModelError: there is no text tower."""
        raise ModelError(self._images_only())

    def logit_scale(self) -> Tensor:
        """() one: there are no texts whose similarity it could scale."""
        return self.mean.new_ones(())

    @property
    def logit_bias(self) -> None:
        """None: there are no texts."""
        return None

    @property
    def text_tower(self) -> TextTower:
        """Raises ModelError: there is no text tower."""
        raise ModelError(self._images_only())

    @property
    def vision_tower(self) -> VisionTower:
        """Raises ModelError: timm's models are not taken apart."""
        raise ModelError(f"timm:{self.name} has no way in. Take an open_clip ViT, e.g. open_clip:ViT-B-32/openai.")

    def record(self) -> dict[str, Any]:
        """Name and preprocessing."""
        return {
            "library": "timm",
            "architecture": self.name,
            "model_cfg": {"timm_model_name": self.name.partition(".")[0]},
            "preprocess_cfg": self.preprocess.to_open_clip(),
            "tokenizer": self.tokenizer_id,
        }

    def weights(self) -> dict[str, Tensor]:
        """The state dict under timm's names."""
        return dict(self.model.state_dict())

    def _images_only(self) -> str:
        return (
            f"timm:{self.name} embeds images only: it has no text tower. Use it for probes, kNN and image retrieval; "
            "for texts take a CLIP model (`vlkit models`)."
        )


def load_timm(rest: str, image_size: int | None = None) -> TimmEncoder:
    """A timm model with trained weights.

    Args:
        rest: timm's name with the tag of its weights, `resnet50.a1_in1k`; with `@FILE` for weights on disk.
        image_size: side of the square input in pixels; default what the weights were trained with. The position
            embeddings of a ViT are resized.

    Raises:
        ModelError: no such model or weights, or it refuses the image size.
        CheckpointError: the file is cut, or belongs to another model.
    """
    import timm

    name, at, file = rest.partition("@")
    # timm takes names it does not know for a hub's, or cuts the tag off.
    if not timm.is_model(name.partition(".")[0]):
        raise ModelError(f"No timm model {name!r}. {did_you_mean(name.partition('.')[0], timm.list_models())}")
    tags = timm.list_pretrained(name.partition(".")[0] + ".*") or timm.list_pretrained(name)
    if "." in name and name not in tags:
        raise ModelError(f"No weights {name!r} in timm. {did_you_mean(name, tags)}")
    size = {} if image_size is None else {"img_size": image_size}
    try:
        model = _build(name, size, pretrained=False) if at else _build_trained(name, size)
    except (AssertionError, ValueError, TypeError) as error:
        raise ModelError(f"timm cannot build {name} at image size {image_size or 'its own'}: {error!r}.") from error
    if at:
        _load(model, Path(file).expanduser(), name)
    return TimmEncoder(model, name, _preprocess_of(model, name, image_size))


def _build(name: str, size: dict[str, int], pretrained: bool) -> nn.Module:
    import timm

    create: Any = timm.create_model
    try:
        model: nn.Module = create(name, pretrained=pretrained, num_classes=0, **size)
    except TypeError:
        if not size:  # convolutional networks take any size and no such argument
            raise
        model = create(name, pretrained=pretrained, num_classes=0)
    return model


def _build_trained(name: str, size: dict[str, int]) -> nn.Module:
    try:
        _require_hub_or_cache(name)
        return _build(name, size, pretrained=True)
    except (AssertionError, ValueError, TypeError):
        raise
    except Exception as error:  # the hub's client and timm each raise their own types
        raise ModelError(
            f"The weights of timm:{name} are not on this machine and cannot be fetched ({error}). Without a network, "
            f"get them on another machine and name the file: timm:{name}@/path/to/model.safetensors."
        ) from error


def _require_hub_or_cache(name: str) -> None:
    """Fail at once without a network: the hub's client retries for most of a minute."""
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    stated = timm.get_pretrained_cfg(name)
    repository = (stated.hf_hub_id if stated else None) or f"timm/{name}"
    if any(isinstance(try_to_load_from_cache(repository, file), str) for file in ("model.safetensors",)):
        return
    host = urlsplit(constants.ENDPOINT).hostname
    if host and not getproxies():
        socket.getaddrinfo(host, 443)


def _load(model: nn.Module, path: Path, name: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"No file of weights {path}.")
    found = read_any_weights(path)
    expected = model.state_dict()
    classifier = getattr(model, "default_cfg", {}).get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    # The classifier is what this model is used without.
    kept = {key: value for key, value in found.items() if not key.startswith(tuple(f"{head}." for head in heads))}
    wrong = differences(found=kept, expected=expected)
    if wrong:
        raise CheckpointError(f"{path} does not hold weights of timm:{name}: {wrong}")
    model.load_state_dict(kept)


def _preprocess_of(model: nn.Module, name: str, image_size: int | None) -> Preprocess:
    from timm import data

    resolve: Any = data.resolve_model_data_config  # type: ignore[attr-defined]
    config = resolve(model)
    side = image_size or config["input_size"][-1]
    try:
        return Preprocess(
            size=side,
            resize_mode=_RESIZE_MODES[config["crop_mode"]],  # type: ignore[arg-type]
            interpolation=config["interpolation"],
            crop_pct=float(config["crop_pct"]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
        )
    except (KeyError, ConfigError) as error:
        raise ModelError(f"The preprocessing of timm:{name} is not supported ({config}): {error}.") from error
