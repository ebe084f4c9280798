"""PACL's vision embedder: patch tokens of a frozen tower into the space of the texts.

    head = PatchAlignment(width=768, embed_dim=512)
    patches = head(encoder.patch_tokens(images))        # (B,P,D), not unit norm

    save_head(head, "runs/pacl/heads/patch_alignment.safetensors", encoder_weights)
    saved = load_head("runs/pacl")                      # a run folder or such a file

Source: Mukhoti et al. 2023, "Open Vocabulary Semantic Segmentation with Patch Aligned Contrastive Learning", CVPR,
arXiv:2212.04994, section 4: main branch Linear, ReLU, Linear, skip branch Linear.
Differs: The text embedder of the formalism is the identity on the encoder's text features. The temperature inside the
attention, which the paper does not state, is kept with the head: 10 unless set, learned if asked for.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlkit.errors import CheckpointError

# Below the run folder.
HEAD_FILE = Path("heads") / "patch_alignment.safetensors"


class PatchAlignment(nn.Module):
    """A residual block from the width of the tower to that of the texts.

    Args:
        width: W of the tower's patch tokens.
        embed_dim: D of the text features.
        attention_scale: multiplier of the cosine in the attention of texts over patches.
        learn_attention_scale: whether it is trained too.
    """

    def __init__(
        self, width: int, embed_dim: int, attention_scale: float = 10.0, learn_attention_scale: bool = False
    ) -> None:
        super().__init__()
        self.first = nn.Linear(width, embed_dim)
        self.second = nn.Linear(embed_dim, embed_dim)
        self.skip = nn.Linear(width, embed_dim)
        log_scale = torch.tensor(math.log(attention_scale))
        if learn_attention_scale:
            self.log_attention_scale: Tensor = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_attention_scale", log_scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (..., W) -> (..., D), not unit norm."""
        found: Tensor = self.skip(tokens) + self.second(self.first(tokens).relu())
        return found

    @property
    def attention_scale(self) -> Tensor:
        """() multiplier, already exponentiated."""
        return self.log_attention_scale.exp()


class SavedHead(NamedTuple):
    """A head as it was trained."""

    head: PatchAlignment
    encoder_weights: str  # hash of the weights of the encoder it belongs to


def save_head(head: PatchAlignment, path: Path, encoder_weights: str) -> None:
    """Write a head and whose it is.

    Args:
        head: any.
        path: a new file; its folder is made.
        encoder_weights: hash of the encoder's weights, as model cards have it.

    Raises:
        CheckpointError: it cannot be written.
    """
    metadata = {"method": "patch_alignment", "encoder_weights": encoder_weights}
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"vlkit": json.dumps(metadata)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot write the head {path}: {error}.") from error


def load_head(place: str | Path) -> SavedHead:
    """The head in a file, or in the folder of the run that trained it.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(place).expanduser()
    path = path / HEAD_FILE if path.is_dir() else path
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})["vlkit"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no dict)
        head = PatchAlignment(tensors["first.weight"].shape[1], tensors["first.weight"].shape[0])
        head.load_state_dict(tensors)
        owner = str(metadata["encoder_weights"])
    except FileNotFoundError as error:
        raise CheckpointError(
            f"There is no patch alignment head at {path}. A run with [loss.patch_alignment] leaves one in its folder."
        ) from error
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} holds no whole patch alignment head: {error}.") from error
    return SavedHead(head.eval().requires_grad_(False), owner)
