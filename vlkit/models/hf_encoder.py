"""CLIP and SigLIP models of transformers behind the DualEncoder interface. The only file that imports transformers.

    load_encoder("hf:openai/clip-vit-base-patch32")     from the hub or its cache
    load_encoder("hf:exports/mine")                     from a folder in the layout of `save_pretrained`

Preprocessing, tokenizer and activation are what the model's own files state. No code of the hub is run.
"""

import json
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import getproxies

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkit.data.transforms import Preprocess
from vlkit.errors import ConfigError, ModelError
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.saved import RECORD, read_json
from vlkit.models.tokenizers import CLIP_BPE, CLIP_VOCABULARY, TextTokenizer, get_tokenizer
from vlkit.models.tower import TextTower, VisionTower

# Words with a suffix, a number, an accent and punctuation: two vocabularies that agree on them are the same one.
_PROBES = ("a photo of a cat.", "unbelievable 42 things, aren't they?", "caf\u00e9 au lait", "zebra-crossing #7")
# transformers numbers its filters as pillow does.
_FILTERS = {2: "bilinear", 3: "bicubic"}
_MODELS = {"clip": "CLIPModel", "siglip": "SiglipModel"}


class HfEncoder(DualEncoder):
    """A CLIPModel or SiglipModel of transformers; `load_hf` makes one.

    There is no way inside its towers: `vlkit export hf:NAME --to open_clip` turns a CLIP model into one that has it.
    Training does so by itself; a SigLIP model is trained, and saved, as it is.

    Args:
        model: the transformers model.
        preprocess: what its image processor states.
        tokenize: its tokenizer.
    """

    def __init__(self, model: nn.Module, preprocess: Preprocess, tokenize: TextTokenizer) -> None:
        config: Any = model.config
        text = config.text_config
        size = config.projection_dim if config.model_type == "clip" else getattr(text, "projection_size", 0)
        super().__init__(
            embed_dim=int(size or text.hidden_size),
            image_size=preprocess.size,
            preprocess=preprocess,
            tokenize=tokenize,
            gives=frozenset({"image", "text"} | ({"logit_bias"} if hasattr(model, "logit_bias") else set())),
        )
        self.model = model

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """Images (B,3,H,W) uint8, or float in [0,1] -> (B,D)."""
        pixels = self.normalize_pixels(images).to(self._model.dtype)
        # Smaller ones come in the first stages of a run: the position embeddings are resized then.
        resize = pixels.shape[-1] != self.image_size
        features = _pooled(self._model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=resize))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Tokens (R,T) -> (R,D). A SigLIP tower looks at padding, so its texts come at full length."""
        length = tokens.shape[1]
        if length > self.context_length:
            raise ModelError(f"Texts have {length} tokens; this model takes {self.context_length}.")
        if self.tokenize.full_context and length < self.context_length:
            tokens = F.pad(tokens, (0, self.context_length - length), value=self.tokenize.vocabulary.pad_id)
        features = _pooled(self._model.get_text_features(input_ids=tokens))
        return F.normalize(features, dim=-1) if normalize else features

    def logit_scale(self) -> Tensor:
        """() multiplier of the cosine, already exponentiated."""
        scale: Tensor = self._model.logit_scale
        return scale.reshape(()).exp()

    @property
    def logit_bias(self) -> Tensor | None:
        """() added after scaling; None for CLIP."""
        bias: Tensor | None = getattr(self._model, "logit_bias", None)
        return None if bias is None else bias.reshape(())

    @property
    def text_tower(self) -> TextTower:
        """Raises ModelError: transformers' towers are not taken apart."""
        raise ModelError(self._no_way_in("text"))

    @property
    def vision_tower(self) -> VisionTower:
        """Raises ModelError: transformers' towers are not taken apart."""
        raise ModelError(self._no_way_in("vision"))

    def record(self) -> dict[str, Any]:
        """Configuration, preprocessing and tokenizer."""
        config = self._model.config.to_dict()
        # Where it was loaded from and by which release says nothing about the features.
        model_cfg = {key: config[key] for key in config.keys() - {"_name_or_path", "transformers_version"}}
        return {
            "library": "transformers",
            "architecture": self._model.config.model_type,
            "model_cfg": json.loads(json.dumps(model_cfg, default=str)),
            "preprocess_cfg": self.preprocess.to_open_clip(),
            "tokenizer": self.tokenizer_id,
        }

    def weights(self) -> dict[str, Tensor]:
        """The state dict under transformers' names."""
        return dict(self.model.state_dict())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations again in backward instead of keeping them."""
        # Where transformers has the new name, the old one warns.
        kind = "activation" if hasattr(self._model, "activation_checkpointing_enable") else "gradient"
        if enable:
            # The other way knows no DDP, and no tower whose input needs no gradient.
            getattr(self._model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(self._model, f"{kind}_checkpointing_disable")()

    @property
    def _model(self) -> Any:
        return self.model

    def _no_way_in(self, tower: str) -> str:
        kind = self._model.config.model_type
        advice = (
            "Write it in open_clip's layout first (`vlkit export hf:NAME --to open_clip --out DIR`) and load "
            "local-dir:DIR."
            if kind == "clip"
            else "Take the same weights from open_clip, or a CLIP ViT such as open_clip:ViT-B-32/openai."
        )
        return f"The {tower} tower of this transformers {kind} model has no way in. {advice}"


def load_hf(source: str, image_size: int | None = None) -> HfEncoder:
    """A model of the Hugging Face hub, its cache, or a folder.

    Args:
        source: `org/name`, or the path of a folder with config.json, the weights, the image processor's
            configuration and the tokenizer.
        image_size: only the model's own; the position embeddings are not resized.

    Raises:
        ModelError: no such model, a kind that is not supported, preprocessing that is not, or another image size.
    """
    config = _fetch("configuration", "AutoConfig", source)
    if config.model_type not in _MODELS:
        known = ", ".join(sorted(_MODELS))
        more = " Its variants of a fixed resolution are of type siglip." if config.model_type == "siglip2" else ""
        raise ModelError(f"hf:{source} is a {config.model_type} model; supported: {known}.{more}")
    # Before the weights, which are large.
    preprocess = preprocess_of(_fetch("image processor", "AutoImageProcessor", source).to_dict(), source)
    expected = int(config.vision_config.image_size)
    if preprocess.size != expected:
        raise ModelError(f"hf:{source}: images are made {preprocess.size} pixels wide, its tower takes {expected}.")
    if image_size not in (None, expected):
        raise ModelError(f"hf:{source} takes images of {expected} pixels, not {image_size}. Leave image_size out.")
    tokenize = _tokenizer_of(config, source)
    model = _fetch("weights", _MODELS[config.model_type], source, dtype=torch.float32)
    return HfEncoder(model, preprocess, tokenize)


def load_saved_hf(folder: Path, image_size: int | None = None) -> HfEncoder:
    """An encoder from a folder as `save_encoder` writes it; the tokenizer keeps the id under which it was known.

    Raises:
        ModelError, CheckpointError: as `load_hf`.
    """
    encoder = load_hf(str(folder), image_size)
    tokenizer_id = str(read_json(folder / RECORD)["tokenizer"])
    own = encoder.tokenize
    if tokenizer_id != own.tokenizer_id:
        encoder.tokenize = TextTokenizer(tokenizer_id, own.context_length, own.full_context, folder)
    return encoder


def preprocess_of(processor: Mapping[str, Any], source: str) -> Preprocess:
    """The preprocessing an image processor of transformers states.

    Args:
        processor: its `to_dict()`, the content of preprocessor_config.json.
        source: names the model in messages.

    Raises:
        ModelError: it asks for something else than resizing, cutting out the centre, and mean and std.
    """
    size = {key: value for key, value in dict(processor.get("size") or {}).items() if value}
    crop = dict(processor.get("crop_size") or {}) if processor.get("do_center_crop") else {}
    side = crop.get("height") or size.get("height") or size.get("shortest_edge")
    filter_ = _FILTERS.get(int(processor.get("resample", 3)))
    whole = len({crop.get("height"), crop.get("width")}) == 1 and len({size.get("height"), size.get("width")}) == 1
    plain_range = abs(float(processor.get("rescale_factor", 1 / 255)) - 1 / 255) < 1e-9
    if not (side and filter_ and whole and plain_range) or (not crop and "shortest_edge" in size):
        raise ModelError(
            f"hf:{source}: its image processor ({dict(processor)}) is not supported. Expected a square size, bilinear "
            "or bicubic resizing, and the centre cut out where only the shorter side is resized."
        )
    normal = bool(processor.get("do_normalize", True))
    try:
        return Preprocess(
            size=int(side),
            resize_mode="shortest" if "shortest_edge" in size else "squash",
            interpolation=filter_,  # type: ignore[arg-type]
            crop_pct=int(side) / int(size.get("shortest_edge") or size["height"]),
            mean=tuple(processor["image_mean"]) if normal else (0.0, 0.0, 0.0),
            std=tuple(processor["image_std"]) if normal else (1.0, 1.0, 1.0),
        )
    except (ConfigError, KeyError) as error:
        raise ModelError(f"hf:{source}: its image processor is not supported: {error}.") from error


def _tokenizer_of(config: Any, source: str) -> TextTokenizer:
    folder = Path(source).expanduser()
    own = TextTokenizer(
        "hf:" + quote(source, safe="/"),
        int(config.text_config.max_position_embeddings),
        full_context=True,
        folder=folder if folder.is_dir() else None,
    )
    if config.model_type == "clip" and config.text_config.vocab_size == CLIP_VOCABULARY:
        clip = get_tokenizer(CLIP_BPE)
        ours = [row[:-1] for row in clip.encode_ragged(_PROBES, own.context_length)]  # theirs end with the padding
        if own.encode_ragged(_PROBES) == ours:
            # Several times faster, and texts may end where they end: the tower reads nothing after the end token.
            return TextTokenizer(CLIP_BPE, own.context_length)
    return own


def _fetch(what: str, class_name: str, source: str, **options: Any) -> Any:
    """`from_pretrained` of a class of transformers: from a folder, the hub's cache, or the hub."""
    import transformers

    read: Callable[..., Any] = getattr(transformers, class_name).from_pretrained
    folder = Path(source).expanduser()
    place = str(folder) if folder.is_dir() else source
    # transformers warns of token ids its own defaults bring in, and draws a bar for every model.
    log: Any = transformers.logging
    level = log.get_verbosity()
    bar = log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        try:
            return read(place, local_files_only=True, trust_remote_code=False, **options)
        except (OSError, ValueError):
            if folder.is_dir():
                raise
            _require_hub()
            return read(place, trust_remote_code=False, **options)
    except Exception as error:  # OSError, ValueError, ImportError, safetensors' and the hub's own types
        raise ModelError(
            f"The {what} of hf:{source} cannot be loaded ({(str(error) or repr(error)).splitlines()[0]}). Expected the "
            "name of a repository on the Hugging Face hub, in its cache, or a folder as save_pretrained writes it. "
            "Without a network, copy that folder here and write hf:FOLDER."
        ) from error
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


def _require_hub() -> None:
    """Fail at once without a network: the hub's client retries for most of a minute."""
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    if host and not getproxies():
        socket.getaddrinfo(host, 443)


def _pooled(output: Any) -> Tensor:
    # A tensor before transformers 5, an output with the projected vector as pooler_output since.
    pooled: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return pooled
