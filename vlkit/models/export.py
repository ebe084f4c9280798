"""A trained model for other libraries: open_clip's `local-dir:`, transformers' `save_pretrained`, ONNX.

export_open_clip(load_encoder("hf:openai/clip-vit-base-patch32"), "clip-b32")
export_hf(load_encoder("run:runs/mine"), "mine-hf")         # CLIPModel.from_pretrained("mine-hf")
export_onnx(load_encoder("run:runs/mine"), "mine-onnx")     # image.onnx, text.onnx, vlkit.json
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from vlkit.data.transforms import Preprocess
from vlkit.errors import ConfigError, ModelError
from vlkit.models.architecture import resolve_architecture
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.hf_layout import (
    config_from_hf,
    config_to_hf,
    processor_to_hf,
    weights_from_hf,
    weights_to_hf,
    write_clip_tokenizer,
)
from vlkit.models.saved import atomic_folder, save_encoder, write_json, write_manifest
from vlkit.models.tokenizers import CLIP_BPE

_ONNX_VERSION = 18


def export_open_clip(encoder: DualEncoder, folder: str | Path) -> Path:
    """Write open_clip's `local-dir:` layout; a CLIP model of transformers is turned into open_clip's form.

    Raises:
        ModelError: the model has no such form (SigLIP of transformers, timm).
        CheckpointError: the folder cannot be written.
    """
    return save_encoder(as_open_clip(encoder), folder)


def as_open_clip(encoder: DualEncoder) -> DualEncoder:
    """The same model on open_clip, with towers that prompts and add-ons get into.

    Raises:
        ModelError: the model has no such form.
    """
    from vlkit.models.open_clip_encoder import construct

    record = encoder.record()
    if record["library"] == "open_clip":
        return encoder
    if record["library"] != "transformers" or record["architecture"] != "clip":
        raise ModelError(
            f"Only CLIP models of transformers have open_clip's form, not {record['library']} {record['architecture']}."
            " SigLIP weights are published for open_clip too: see `vlkit models siglip`."
        )
    if encoder.tokenizer_id != CLIP_BPE:
        raise ModelError(
            f"This model has the tokenizer {encoder.tokenizer_id}, and open_clip's CLIP that of OpenAI: texts would be "
            "read as others."
        )
    if encoder.preprocess.crop_pct != 1:
        raise ModelError(
            f"This model cuts images to {encoder.preprocess.crop_pct:.3f} of their side, which open_clip cannot record."
        )
    stated: Preprocess = encoder.preprocess
    resolved = resolve_architecture(config_from_hf(record["model_cfg"]), stated.to_open_clip() | {"size": None}, "hf")
    converted = construct(resolved)
    converted.model.load_state_dict(weights_from_hf(encoder.weights()), strict=True)
    return converted.eval()


def export_hf(encoder: DualEncoder, folder: str | Path) -> Path:
    """Write what `CLIPModel`, `CLIPImageProcessor` and `CLIPTokenizer` of transformers load.

    A model of transformers (SigLIP too) keeps its class, processor and tokenizer.

    Raises:
        ModelError: a CLIPModel cannot compute what this model does.
        CheckpointError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    from vlkit.models.open_clip_encoder import OpenClipEncoder

    if encoder.record()["library"] == "transformers":
        return save_encoder(encoder, folder)
    if not isinstance(encoder, OpenClipEncoder):
        raise ModelError(f"Only models on open_clip are written for transformers, not a {type(encoder).__name__}.")
    config = config_to_hf(encoder.architecture)
    processor = processor_to_hf(encoder.architecture)
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in encoder.weights().items()}
    with atomic_folder(folder) as new:
        save_file(weights_to_hf(weights), new / "model.safetensors", metadata={"format": "pt"})
        write_json(new / "config.json", config)
        write_json(new / "preprocessor_config.json", processor)
        write_clip_tokenizer(new, encoder.context_length)
        write_manifest(new)
    return Path(folder)


class _ImageGraph(nn.Module):
    """Pixels (B,3,S,S) float in [0,1] -> unit features (B,D); mean and std are inside."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder.encode_image(pixels)


class _TextGraph(nn.Module):
    """Tokens (R,T) int64 at the full context length -> unit features (R,D)."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor) -> Tensor:
        if "text_tower" in self.encoder.gives:
            # Whole, without the trimming to the longest text, which depends on the data.
            return nn.functional.normalize(self.encoder.text_tower.run(tokens), dim=-1)
        return self.encoder.encode_text(tokens)


def export_onnx(encoder: DualEncoder, folder: str | Path) -> Path:
    """Write image.onnx and text.onnx, both with a free batch dimension, and vlkit.json.

    image.onnx takes `pixels` (B,3,S,S) float32 in [0,1], preprocessed as vlkit.json states, and gives `features`
    (B,D), unit norm. text.onnx takes `tokens` (R,T) int64 padded to the context length and gives `features` (R,D).

    Raises:
        ConfigError: the extra `export` is not installed.
        CheckpointError: the folder cannot be written.
    """
    try:
        import onnx  # noqa: F401  (torch's exporter imports them late, with a message of its own)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError("ONNX export needs the extra `export`: pip install 'vlkit[export]'.") from error
    device = encoder.device
    size = encoder.image_size
    bias = encoder.logit_bias
    record = {
        **encoder.record(),
        "image_size": size,
        "context_length": encoder.context_length,
        "logit_scale": float(encoder.logit_scale().detach()),
        "logit_bias": None if bias is None else float(bias.detach()),
        "family": encoder.training_family,
    }
    with atomic_folder(folder) as new:
        # Two rows: torch takes a dimension of one for a constant.
        _to_onnx(_ImageGraph(encoder), torch.zeros(2, 3, size, size, device=device), "pixels", new / "image.onnx")
        if "text" in encoder.gives:
            tokens = torch.zeros(2, encoder.context_length, dtype=torch.int64, device=device)
            _to_onnx(_TextGraph(encoder), tokens, "tokens", new / "text.onnx")
        write_json(new / "vlkit.json", record)
        write_manifest(new)
    return Path(folder)


def _to_onnx(graph: nn.Module, example: Tensor, name: str, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        torch.onnx.export(
            graph.eval(),
            (example,),
            path,
            input_names=[name],
            output_names=["features"],
            dynamic_shapes=({0: batch},),
            opset_version=_ONNX_VERSION,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
