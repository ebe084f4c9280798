"""Head ablation: chosen attention heads write the same into every image feature, so that a cue they see cannot count.

    head_ablation:heads=4.2+5.0                       # layer.head, numbered as `vlkit interpret text_span` does
    head_ablation:spans=out/heads.json,about=water|sea    # heads one of whose texts there holds such a word

    raw' = raw + sum over heads ( |raw| mean over reference images of (c / |raw|)  -  c )

c is what a head of a layer writes into the class token, through the last norm (with the deviation of the image's own
token) and the projection; later layers still see what the head wrote. The feature is the mean-ablated sum of
`vlkit.interpret.decomposition`: `without_heads(decompose(encoder, images), heads, means)`.

Source: Gandelsman, Efros and Steinhardt 2024, "Interpreting CLIP's Image Representation via Text-Based
Decomposition", ICLR, arXiv:2310.05916, section 5.1: heads that TextSpan shows to look for places are mean-ablated, and
the worst group of Waterbirds gains.
Differs: heads are named, or found by words in their texts; the paper chose them by looking. MLPs keep their own values
(the paper puts means for them too: `without_heads(..., mlps=True)`).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vlkit.addons.base import Need, TowerEdit, learned
from vlkit.contracts import Progress
from vlkit.data.images import iterate_images
from vlkit.errors import ConfigError, DataError
from vlkit.interpret.decomposition import class_token_heads, class_token_tower, through_last_norm
from vlkit.models.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

Head = tuple[int, int]  # layer and head, both from 0
_BATCH = 64


@dataclass(frozen=True)
class HeadAblation(TowerEdit):
    """Heads whose part of the image feature is that of the mean image.

    Attributes:
        heads: `layer.head`, several with `+`; a layer may be negative: from the end.
        spans: heads.json of `vlkit interpret text_span`, in place of `heads`.
        about: words with `|`: heads of `spans` one of whose texts holds one of them.
        num_images: of the reference, drawn by its seed, that the mean is taken over.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"unlabelled_images", "pixels"})

    heads: str = ""
    spans: str = ""
    about: str = ""
    num_images: int = 1000
    chosen: list[list[int]] | None = learned()
    means: Tensor | None = learned()  # (n,W) of each chosen head, behind the last norm, of features of unit length

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Choose the heads, and take their means.

        Raises:
            ConfigError: no heads, heads the tower has not, or other add-ons that change features before.
            DataError: a file of spans that is none, or no image that can be read.
            ModelError: the tower does not read its feature off the class token.
        """
        if reference.before:
            raise ConfigError("head_ablation takes its means from the plain model. Fit it alone.")
        encoder = embedder.embedder.encoder
        tower = class_token_tower(encoder)
        asked = _parsed(self.heads) if self.heads else _found(self.spans, self.about)
        chosen = _checked(asked, len(tower.blocks), tower.blocks[0].module)
        assert reference.images is not None
        drawn = torch.randperm(len(reference.images), generator=torch.Generator().manual_seed(reference.seed))
        records = [reference.images.records[row] for row in drawn[: self.num_images].tolist()]
        total, count = torch.zeros(len(chosen), 1), 0
        with torch.inference_mode():
            for chunk in iterate_images(records, encoder.preprocess, batch_size=_BATCH, workers=1):
                if chunk.rows:
                    total = total + _shares(encoder, chunk.images.to(encoder.device), chosen).sum(0).cpu()
                    count += len(chunk.rows)
                if progress:
                    progress(count, len(records))
        if not count:
            raise DataError(f"head_ablation: none of the {len(records)} reference images could be read.")
        return replace(self, chosen=[list(head) for head in chosen], means=total / count)

    @contextmanager
    def edit(self, encoder: DualEncoder) -> Iterator[None]:
        """Image features with the means of these heads; patches stay.

        Raises:
            ModelError: the tower does not read its feature off the class token.
        """
        assert self.chosen is not None and self.means is not None, "head_ablation is not fitted"
        heads, means = [(layer, head) for layer, head in self.chosen], self.means.sum(0)
        untyped: Any = encoder
        projection: Tensor = untyped.model.visual.proj

        def hook(norm: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
            own = through_last_norm(norm, inputs[0][:, 0], _ordered(written, heads)).sum(1)
            length = (out[:, 0] @ projection).norm(dim=-1, keepdim=True)
            changed = out[:, 0] + length * means.to(out) - own
            return torch.cat([changed[:, None], out[:, 1:]], dim=1)

        with _watched(encoder, heads) as written:
            handle = untyped.model.visual.ln_post.register_forward_hook(hook)
            try:
                yield
            finally:
                handle.remove()


@contextmanager
def _watched(encoder: DualEncoder, heads: Sequence[Head]) -> Iterator[dict[int, Tensor]]:
    """What the chosen heads of each layer write into the class token (B,n,W), of the batch that went through last."""
    written: dict[int, Tensor] = {}
    of_layer = {layer: [head for other, head in heads if other == layer] for layer, _ in heads}

    def hook_of(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            written[layer] = class_token_heads(module, inputs[0], of_layer[layer])

        return hook

    blocks = class_token_tower(encoder).blocks
    with ExitStack() as stack:
        for layer in of_layer:
            stack.callback(blocks[layer].module.register_forward_pre_hook(hook_of(layer)).remove)
        yield written


def _ordered(written: Mapping[int, Tensor], heads: Sequence[Head]) -> Tensor:
    """(B,n,W): heads are sorted, so layers one after the other are their order."""
    return torch.cat([written[layer] for layer in dict.fromkeys(layer for layer, _ in heads)], dim=1)


def _shares(encoder: DualEncoder, images: Tensor, heads: Sequence[Head]) -> Tensor:
    """(B,n,W) what each head writes, behind the last norm, of a feature of unit length."""
    untyped: Any = encoder
    tower, norm = encoder.vision_tower, untyped.model.visual.ln_post
    with _watched(encoder, heads) as written:
        x = tower.through_blocks(images)
        length = tower.finish(x).norm(dim=-1)
        shares: Tensor = through_last_norm(norm, x[:, 0], _ordered(written, heads)) / length[:, None, None]
    return shares


def _parsed(text: str) -> list[Head]:
    pairs = [part.strip().split(".") for part in text.split("+")]
    try:
        return [(int(layer), int(head)) for layer, head in pairs]
    except ValueError as error:
        raise ConfigError(f"head_ablation:heads is {text!r}; expected layer.head, e.g. 4.2+5.0.") from error


def _found(file: str, about: str) -> list[Head]:
    """Heads whose texts hold one of the words."""
    words = [word.strip().lower() for word in about.split("|") if word.strip()]
    if not file or not words:
        raise ConfigError(
            "head_ablation needs heads: head_ablation:heads=4.2+5.0, or head_ablation:spans=heads.json,about=water|sea "
            "with the file that `vlkit interpret text_span` writes."
        )
    try:
        lines = json.loads(Path(file).read_text(encoding="utf-8"))
        spans = [((int(one["layer"]), int(one["head"])), " ".join(one["texts"]).lower()) for one in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is no heads.json of `vlkit interpret text_span`: {error}.") from error
    found = [head for head, texts in spans if any(word in texts for word in words)]
    if not found:
        raise ConfigError(f"No head in {file} has a text with {' or '.join(words)}; look into it, or name the heads.")
    return found


def _checked(heads: Sequence[Head], num_layers: int, module: Any) -> list[Head]:
    """In order, from the front."""
    num_heads = int(module.attn.num_heads)
    for layer, head in heads:
        if not (-num_layers <= layer < num_layers and 0 <= head < num_heads):
            raise ConfigError(f"No head {head} in layer {layer}: this tower has {num_layers} layers of {num_heads}.")
    return sorted({(layer % num_layers, head) for layer, head in heads})


ADDON = HeadAblation
