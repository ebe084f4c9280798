"""Models of open_clip behind the DualEncoder interface. The only file that imports open_clip.

There is one shape of model: open_clip's custom-text form, with the text tower under `.text`. Plain CLIP weights are
converted when they are loaded.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkit.errors import CheckpointError, ModelError, did_you_mean
from vlkit.models import open_clip_towers as towers
from vlkit.models.architecture import Architecture, resolve_architecture
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.tokenizers import TextTokenizer
from vlkit.models.tower import TextTower, VisionTower

# Fewer texts than this run as one piece.
_ROWS_WORTH_SORTING = 64


class OpenClipEncoder(DualEncoder):
    """An open_clip model. Build it with `build_encoder`, or load it with `vlkit.load_encoder`.

    Args:
        model: an open_clip CustomTextCLIP or CoCa.
        architecture: what it was built from, with the preprocessing its weights were trained with.
        folder: where the files of the tokenizer lie, when not in the hub's cache.
    """

    def __init__(self, model: nn.Module, architecture: Architecture, folder: Path | None = None) -> None:
        vision, text = _parts(model)
        stops_at_end = towers.stops_at_end(text)
        super().__init__(
            embed_dim=architecture.embed_dim,
            image_size=architecture.image_size,
            preprocess=architecture.preprocess,
            tokenize=TextTokenizer(
                architecture.tokenizer_id(), architecture.context_length, full_context=not stops_at_end, folder=folder
            ),
            gives=frozenset({"image", "text"}) | towers.gives(vision, text) | _bias_name(model),
        )
        self.model = model
        self.architecture = architecture
        self.drops_patches = architecture.patch_dropout > 0
        self._stops_at_end = stops_at_end

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """Images (B,3,H,W) uint8, or float in [0,1] -> (B,D)."""
        if "vision_tower" in self.gives:
            features = self.vision_tower.run(images)
        else:
            features = self._model.encode_image(self._pixels(images), normalize=False)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Tokens (R,T) -> (R,D), run only up to the longest text where that is exact."""
        tokens = self._fit_tokens(tokens)
        if "text_tower" in self.gives:
            features = self._run_text_tower(tokens)
        else:
            features = self._model.encode_text(tokens, normalize=False)
        return F.normalize(features, dim=-1) if normalize else features

    def logit_scale(self) -> Tensor:
        """() multiplier of the cosine, already exponentiated."""
        return self.log_scale.reshape(()).exp()

    @property
    def log_scale(self) -> nn.Parameter:
        """open_clip's own parameter: the logarithm of the scale."""
        parameter: nn.Parameter = self._model.logit_scale
        return parameter

    @property
    def logit_bias(self) -> Tensor | None:
        """() added after scaling; None for models trained with a softmax loss."""
        bias: Tensor | None = self._model.logit_bias
        return None if bias is None else bias.reshape(())

    @property
    def text_tower(self) -> TextTower:
        """The way into the text tower.

        Raises:
            ModelError: a Hugging Face tower, or one with a class token (CoCa).
        """
        _, text = _parts(self.model)
        if not towers.has_text_tower(text):
            raise ModelError(
                f"The text tower of {self.architecture.name} is {towers.describe(text)}: there is no way inside it. "
                "Take a model with open_clip's own text transformer, e.g. ViT-B-32."
            )
        return towers.text_tower(text)

    @property
    def vision_tower(self) -> VisionTower:
        """The way into the vision tower.

        Raises:
            ModelError: a timm tower, a ResNet, or one that pools by attention.
        """
        vision, _ = _parts(self.model)
        if not towers.has_vision_tower(vision):
            raise ModelError(
                f"The vision tower of {self.architecture.name} is {towers.describe(vision)}: there is no way inside "
                "it, and it gives no patch tokens. Take a model with open_clip's own ViT, e.g. ViT-B-32."
            )
        return towers.vision_tower(vision, self._pixels)

    def record(self) -> dict[str, Any]:
        """Architecture, preprocessing and tokenizer."""
        return {"library": "open_clip", **self.architecture.record(), "tokenizer": self.tokenizer_id}

    def weights(self) -> dict[str, Tensor]:
        """The state dict under open_clip's names."""
        return dict(self.model.state_dict())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations again in backward instead of keeping them."""
        self._model.set_grad_checkpointing(enable)

    @property
    def _model(self) -> Any:
        return self.model

    def _pixels(self, images: Tensor) -> Tensor:
        return self.normalize_pixels(images).to(next(self._model.visual.parameters()).dtype)

    def _run_text_tower(self, tokens: Tensor) -> Tensor:
        if tokens.device.type != "cpu" or len(tokens) < _ROWS_WORTH_SORTING or not self._stops_at_end:
            return self.text_tower.run(tokens)
        # Captions of one batch differ a lot in length: sorted into quarters, each runs up to its own longest. Exact,
        # and on a CPU, where time is arithmetic, about a third faster; a GPU would wait for four small launches.
        ends = towers.end_positions(self._model.text, tokens)
        order = ends.argsort(stable=True)
        parts = [self.text_tower.run(tokens[rows, : int(ends[rows].max()) + 1]) for rows in order.chunk(4)]
        return torch.cat(parts)[order.argsort()]

    def _fit_tokens(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.context_length:
            raise ModelError(f"Texts have {length} tokens; {self.architecture.name} takes {self.context_length}.")
        if not self._stops_at_end:
            missing = self.context_length - length
            return F.pad(tokens, (0, missing), value=self.tokenize.vocabulary.pad_id) if missing else tokens
        # Only for texts padded to the full context: the loader trims its batches, and asking for the longest text
        # makes the host wait for the device.
        if length < self.context_length or not len(tokens):
            return tokens
        return tokens[:, : int(towers.end_positions(self._model.text, tokens).max()) + 1]


def build_encoder(
    architecture: str | Mapping[str, Any],
    *,
    image_size: int | None = None,
    context_length: int | None = None,
    init_logit_bias: float | None = None,
    patch_dropout: float | None = None,
    preprocess: Mapping[str, Any] | None = None,
) -> OpenClipEncoder:
    """An encoder with random weights, drawn from torch's global generator.

    Args:
        architecture: a name of open_clip (see `vlkit models`), or an inline one: `embed_dim`, `vision_cfg`,
            `text_cfg` and what else open_clip's JSON files hold.
        image_size: side of the square input in pixels; default the architecture's.
        context_length: most tokens a text may have; default the architecture's.
        init_logit_bias: gives the model a bias, for sigmoid losses (-10 is usual).
        patch_dropout: share of patches left out in training, in [0,1).
        preprocess: mean, std, interpolation, resize_mode, fill_color; default OpenAI's.

    Raises:
        ModelError: an unknown name or key, or sizes that do not go together.
    """
    resolved = resolve_architecture(architecture, preprocess).with_changes(
        image_size=image_size,
        context_length=context_length,
        init_logit_bias=init_logit_bias,
        patch_dropout=patch_dropout,
    )
    return construct(resolved)


def construct(architecture: Architecture, folder: Path | None = None) -> OpenClipEncoder:
    """An encoder with random weights for a resolved architecture; `folder` may hold its tokenizer.

    Raises:
        ModelError: open_clip cannot build it.
    """
    import open_clip

    config = architecture.constructor_arguments()
    for section, kind in (("vision_cfg", open_clip.CLIPVisionCfg), ("text_cfg", open_clip.CLIPTextCfg)):
        known = [field.name for field in fields(kind)]
        for key in config[section]:
            if key not in known:
                raise ModelError(f"{architecture.name}: unknown key {section}.{key}. {did_you_mean(key, known)}")
    model_class = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    try:
        model = model_class(**config)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError, ZeroDivisionError, OSError) as error:
        raise ModelError(f"open_clip cannot build architecture {architecture.name}: {error!r}.") from error
    if isinstance(model, open_clip.CoCa):
        # open_clip writes how to draw it (MultimodalTransformer.init_parameters) and never does: it holds what the
        # memory held, which may be NaN.
        projection = model.text_decoder.text_projection
        nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
    _set_timm_size(model.visual, architecture)
    open_clip.set_model_preprocess_cfg(model, architecture.preprocess.to_open_clip())
    return OpenClipEncoder(model, architecture, folder)


def load_published(encoder: OpenClipEncoder, path: Path, names: frozenset[str], where: str) -> None:
    """Put weights of any layout open_clip knows (plain CLIP, Hugging Face, big_vision) into an encoder.

    Position embeddings of another length are resized. Our own saved models go through `load_exact` instead.

    Args:
        encoder: built from the architecture the weights were trained with.
        path: safetensors, or a torch file without code.
        names: of the tensors in the file, from `weight_names(path)`, which also proves that it holds no code.
        where: names the weights in messages.

    Raises:
        CheckpointError: the file does not fit.
    """
    import open_clip

    bias = encoder.logit_bias
    if bias is None and "logit_bias" in names:
        raise CheckpointError(
            f"{where} was trained with a sigmoid loss and brings a logit_bias; {encoder.architecture.name} has none. "
            "Name the architecture it was trained as, or set init_logit_bias = -10."
        )
    start = None if bias is None else bias.detach().clone()
    try:
        open_clip.load_checkpoint(encoder.model, str(path), strict=True)
    except (RuntimeError, KeyError, AttributeError, AssertionError, ValueError) as error:
        raise CheckpointError(f"{where} does not fit architecture {encoder.architecture.name}: {error}") from error
    if start is not None and "logit_bias" not in names:
        # open_clip sets the bias to 0 then, from which sigmoid training hardly starts.
        encoder.model.logit_bias.data.fill_(start.item())  # type: ignore[operator]


def _parts(model: Any) -> tuple[nn.Module, nn.Module]:
    return model.visual, model.text


def _bias_name(model: Any) -> frozenset[str]:
    return frozenset() if model.logit_bias is None else frozenset({"logit_bias"})


def _set_timm_size(vision: Any, architecture: Architecture) -> None:
    if type(vision).__name__ != "TimmModel" or not hasattr(vision, "set_input_size"):
        return
    before = {name: value.shape for name, value in vision.state_dict().items()}
    try:
        vision.set_input_size(architecture.image_size)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ModelError(f"{architecture.name}: its timm tower refuses this image size: {error!r}.") from error
    if before != {name: value.shape for name, value in vision.state_dict().items()}:
        # Plain open_clip could not load such weights: it builds the timm model at its own size.
        raise ModelError(
            f"{architecture.name}: its timm tower has weights for another image size than {architecture.image_size}. "
            "Name the timm model made for that size."
        )
