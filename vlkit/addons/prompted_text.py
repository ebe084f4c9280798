"""Texts with vectors of one's own in place of some words, through a frozen text tower.

prompts = prompt_tokens(encoder, names, words=[320, 1125, 539, 320], position="end")    # "a photo of a {}."
text = PromptedText(encoder, prompts)
text.features(text.words)              # (R,D): to the bit those of the texts themselves
text.features(context)                 # context (M,W), (R,M,W), or (B,1,M,W) -> (B,R,D)

The tower runs only up to the longest prompt, for all classes in one pass. Vectors in front of the names, where all
classes have the same, go through it once and not once a class (`shared_prefix.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import TowerEdit
from vlkit.addons.class_names import ClassName
from vlkit.addons.exchange import ClassWeights
from vlkit.addons.shared_prefix import SharedPrefix
from vlkit.errors import ConfigError
from vlkit.features.source import FeatureSource
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.tokenizers import CLIP_BPE

Position = Literal["end", "middle", "front"]
Precision = Literal["fp32", "bf16"]
# Prompts that go through the tower together where no gradient is wanted.
ROWS_AT_ONCE = 2048


class Prompts(NamedTuple):
    """Tokens of prompts, and which of them are replaced."""

    tokens: Tensor  # (R,T) int64
    places: Tensor  # (R,M) int64, positions of the M vectors in each prompt
    class_of: Tensor  # (R,) int64: a class has a prompt for each of its names


def encoder_of(source: FeatureSource) -> DualEncoder:
    """The model behind a source, with a text tower that prompts can be put into.

    Raises:
        ConfigError: a tokenizer with another rule for the end of a text, or an edited text tower.
        ModelError: a text tower without a way in.
    """
    edits: Sequence[object] = getattr(source, "edits", ()) or getattr(getattr(source, "plain", None), "edits", ())
    for edit in edits:
        if isinstance(edit, TowerEdit) and "text" in edit.towers:
            raise ConfigError(f"Learned prompts go through the plain text tower, which {edit.name} changes. Drop one.")
    encoder = source.embedder.encoder
    if encoder.tokenizer_id.partition("?")[0] != CLIP_BPE:
        raise ConfigError(
            f"Learned prompts need CLIP's tokenizer ({CLIP_BPE}) and its rule for the end-of-text token; this model "
            f"has {encoder.tokenizer_id}. Take a CLIP model (`vlkit models`)."
        )
    _ = encoder.text_tower  # refuses towers without a way in
    return encoder


def word_ids(encoder: DualEncoder, words: str) -> list[int]:
    """Tokens of some words, without start and end."""
    return encoder.tokenize.encode_whole([words])[0][1:-1]


def first_names(class_names: Sequence[ClassName]) -> list[ClassName]:
    """The classes without their synonyms, for methods with one row a class."""
    return [ClassName(item.shown, item.names[:1]) for item in class_names]


def prompt_tokens(
    encoder: DualEncoder,
    class_names: Sequence[ClassName],
    words: Sequence[int],
    position: Position = "end",
    closing: str = ".",
) -> Prompts:
    """Tokens of "{words} {name}." for every name; `middle` and `front` put the name into or before the words.

    Args:
        encoder: of the texts.
        class_names: C classes; each of their names gets a prompt.
        words: M tokens, which are replaced.
        position: of the name.
        closing: what ends a prompt.

    Raises:
        ConfigError: names too long for the context; they are named.
    """
    names = [name for item in class_names for name in item.names]
    class_of = torch.tensor([place for place, item in enumerate(class_names) for _ in item.names])
    encode = encoder.tokenize.encode_whole
    start, *stop, end = encode([closing])[0]
    # The period is encoded with the name: after "St." the two make one token.
    with_stop, bare = ([row[1:-1] for row in encode(texts)] for texts in ([name + closing for name in names], names))
    half = len(words) // 2
    rows: list[list[int]] = []
    places: list[list[int]] = []
    for name, closed in zip(bare, with_stop, strict=True):
        if position == "end":
            body, at = [*words, *closed], [*range(len(words))]
        else:
            before = half if position == "middle" else 0
            body = [*words[:before], *name, *words[before:], *stop]
            at = [*range(before), *range(before + len(name), len(words) + len(name))]
        rows.append([start, *body, end])
        places.append([place + 1 for place in at])
    require_room(names, rows, len(words), encoder.context_length)
    return Prompts(encoder.tokenize.pad(rows), torch.tensor(places, dtype=torch.int64), class_of)


def require_room(names: Sequence[str], rows: Sequence[Sequence[int]], num_words: int, room: int) -> None:
    """Refuse prompts longer than the text tower takes.

    Raises:
        ConfigError: names them.
    """
    long = [name for name, row in zip(names, rows, strict=True) if len(row) > room]
    if long:
        shown = ", ".join(repr(name) for name in long[:5]) + (f" and {len(long) - 5} more" if len(long) > 5 else "")
        raise ConfigError(
            f"{len(long)} of {len(names)} class names are too long: {shown}. The text tower takes {room} tokens, of "
            f"which {num_words} are learned and 3 start, end and period. Shorten them, or learn fewer (context=...)."
        )


@dataclass(frozen=True)
class PromptedText:
    """A frozen text tower with prompts whose tokens at `places` are replaced by vectors.

    Attributes:
        encoder: its weights are not trained.
        prompts: R of them.
        precision: of the tower; features are float32.
        checkpointing: compute activations again in backward instead of keeping them.
        words: (R,M,W) vectors of the tokens that are replaced.
        embedded: (R,T,W) the prompts as they are, with positions.
        shared: the way for vectors that all prompts begin with; None where names come before or between them.
    """

    encoder: DualEncoder
    prompts: Prompts
    precision: Precision = "fp32"
    checkpointing: bool = False
    words: Tensor = field(init=False, repr=False)
    embedded: Tensor = field(init=False, repr=False)
    shared: SharedPrefix | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        device, tower = self.encoder.device, self.encoder.text_tower
        moved = Prompts(*(one.to(device) for one in self.prompts))
        object.__setattr__(self, "prompts", moved)
        with torch.inference_mode(False), torch.no_grad():
            object.__setattr__(self, "embedded", tower.embed(moved.tokens).clone())
            object.__setattr__(self, "words", tower.token_vectors(moved.tokens.gather(1, moved.places)).clone())
            shared = SharedPrefix.of(tower, moved.tokens)
        early = shared is not None and bool((moved.places < shared.length).all())
        object.__setattr__(self, "shared", shared if early else None)

    def features(self, context: Tensor) -> Tensor:
        """(R,D) unit norm; of `words` to the bit those of the texts.

        Args:
            context: (M,W), or (R,M,W) for one set a prompt; further dimensions before these give (...,R,D).
        """
        if self.shared and (context.ndim == 2 or context.shape[-3] == 1):
            return self._common(self.shared, context if context.ndim == 2 else context.squeeze(-3))
        old, plain = self.words, self.embedded
        # What is added, not what is put: words themselves then change no bit.
        added = (context.to(old) - old).to(plain.dtype)
        lead = added.shape[:-3]
        x = plain.expand(*lead, *plain.shape).reshape(-1, *plain.shape[-2:])
        places = self.prompts.places.expand(*lead, -1, -1).reshape(-1, old.shape[1])
        x = x.scatter_add(1, places[..., None].expand(-1, -1, x.shape[-1]), added.reshape(-1, *added.shape[-2:]))
        tokens = self.prompts.tokens.expand(*lead, -1, -1).reshape(-1, self.prompts.tokens.shape[1])
        if torch.is_grad_enabled():
            out = self._through(x, tokens)
        else:
            pairs = zip(x.split(ROWS_AT_ONCE), tokens.split(ROWS_AT_ONCE), strict=True)
            out = torch.cat([self._through(*pair) for pair in pairs])
        features: Tensor = F.normalize(out.float(), dim=-1).unflatten(0, (*lead, len(plain)))
        return features

    def weights(self, features: Tensor) -> ClassWeights:
        """Features (R,D) as class weights: a class scores the best of its names."""
        return ClassWeights(features, self.prompts.class_of)

    def scores(self, images: Tensor, features: Tensor) -> Tensor:
        """(B,C) cosine of images (B,D) with features (R,D)."""
        return self.weights(features).scores(images)

    def per_image_scores(self, images: Tensor, features: Tensor) -> Tensor:
        """(B,C) cosine of images (B,D), each with features (B,R,D) of its own."""
        return self.view_scores(images[:, None], features)[:, 0]

    def view_scores(self, views: Tensor, features: Tensor) -> Tensor:
        """(B,V,C) cosine of views (B,V,D) of each image with features (B,R,D) of its own."""
        reduced = self.weights(features[0]).reduced((views @ features.mT).flatten(0, 1))
        scores: Tensor = reduced.unflatten(0, views.shape[:2])
        return scores

    def _common(self, shared: SharedPrefix, context: Tensor) -> Tensor:
        """(...,R,D) of vectors (...,M,W) that all prompts have in common."""
        first = self.embedded[0, : shared.length]
        added = (context.to(first) - self.words[0]).reshape(-1, *self.words.shape[1:])
        places = self.prompts.places[0, :, None].expand(len(added), -1, first.shape[-1])
        prefix = first.expand(len(added), -1, -1).scatter_add(1, places, added)
        with self._autocast():
            out = shared.features(prefix, self.embedded[:, shared.length :], checkpointing=self.checkpointing)
        features: Tensor = F.normalize(out.float(), dim=-1).unflatten(0, context.shape[:-2] or (1,))
        return features if context.ndim > 2 else features[0]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.encoder.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _through(self, x: Tensor, tokens: Tensor) -> Tensor:
        tower = self.encoder.text_tower
        with self._autocast():
            for block in tower.blocks:
                x = (replace(block, recompute=True) if self.checkpointing and torch.is_grad_enabled() else block)(x)
            return tower.finish(x, tokens)
