"""PACL's score: an image answers a text through those of its patches that the text attends to.

    phi(x, t) = cos(sum_k a_k v_k, t),   a_k = softmax_k(scale cos(v_k, t)),   v = head(patch tokens)

The head comes from a run with [loss.patch_alignment] (`--addon pacl:head=runs/pacl`), or is trained here, on the images
and captions of the reference, with the same loss.

Source: Mukhoti et al. 2023, "Open Vocabulary Semantic Segmentation with Patch Aligned Contrastive Learning", CVPR,
arXiv:2212.04994: classification and segmentation by the trained compatibility.
Differs: Trained here it takes few steps (10 epochs of AdamW at 5e-4, the paper's rate and decay, one caption of each
image an epoch), with the encoder's own temperature; the paper trains on 30 million pairs. A feature map changes the
texts, but no patches.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import Need, PairScoring, Vectors, learned
from vlkit.addons.feature_training import Schedule, train
from vlkit.contracts import Progress
from vlkit.errors import ConfigError, ModelError
from vlkit.losses.patch_alignment import alignment_scores, patch_alignment_loss
from vlkit.models.heads.patch_alignment import PatchAlignment, load_head

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

WEIGHT_DECAY = 0.2
# Images that go through the head at a time.
_ROWS = 256


@dataclass(frozen=True)
class Pacl(PairScoring):
    """Text-conditioned pooling of patches that a head has aligned with texts.

    Attributes:
        head: a run folder with a trained head, or its file; empty: trained on the reference.
        epochs, lr, batch_size: of that training.
        attention_scale: of the cosine inside the attention, of a head trained here.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"patch_tokens"})
    uses: ClassVar[frozenset[Need]] = frozenset({"unlabelled_images", "captions"})

    head: str = ""
    epochs: int = 10
    lr: float = 5e-4
    batch_size: int = 256
    attention_scale: float = 10.0
    first_weight: Tensor | None = learned()  # (D,W)
    first_bias: Tensor | None = learned()
    second_weight: Tensor | None = learned()  # (D,D)
    second_bias: Tensor | None = learned()
    skip_weight: Tensor | None = learned()  # (D,W)
    skip_bias: Tensor | None = learned()
    log_attention_scale: Tensor | None = learned()  # ()

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Take the head over, or train it.

        Raises:
            ConfigError: a head of another encoder, or neither a head nor captions of images to train on.
            CheckpointError: there is no head at that place.
        """
        if not self.head:
            trained = self._trained(reference, embedder, progress)
            return self._with(trained)
        saved = load_head(self.head)
        if saved.encoder_weights != embedder.card.weights:
            raise ConfigError(
                f"The head {self.head} was trained on another encoder than {embedder.card.name}. Take the model that "
                "its run used, or train the head anew."
            )
        return self._with(saved.head)

    def score(self, queries: Vectors, gallery: Vectors) -> Tensor:
        """(q,g) cosines."""
        images, texts = (queries, gallery) if queries.kind == "image" else (gallery, queries)
        with torch.no_grad():
            unit = F.normalize(texts.pooled, dim=-1)
            scores = alignment_scores(self.patches(images), unit, self._head().attention_scale)
        return scores if queries.kind == "image" else scores.T

    def patches(self, images: Vectors) -> Tensor:
        """(n,P,D) aligned patches of any length: what segmentation scores.

        Raises:
            ModelError: features without patch tokens.
        """
        if images.patch_tokens is None:
            raise ModelError("pacl needs patch tokens, and these image features have none. Embed with patches.")
        tokens, head = images.patch_tokens, self._head()
        with torch.no_grad():
            parts = [head(part.float()) for part in tokens.split(_ROWS)]
        return torch.cat(parts) if parts else tokens.new_empty(0, tokens.shape[1], len(head.second.weight))

    def patches_of(self, tokens: Tensor) -> Tensor:
        """Patch tokens (B,P,W) to aligned patches (B,P,D), on the device of the tokens."""
        found: Tensor = self._head().to(tokens.device)(tokens.float())
        return found

    def _head(self) -> PatchAlignment:
        state = {key.replace("_weight", ".weight").replace("_bias", ".bias"): getattr(self, key) for key in _TENSORS}
        assert state["first.weight"] is not None, "pacl is not fitted"
        head = PatchAlignment(state["first.weight"].shape[1], len(state["first.weight"]))
        head.load_state_dict(state)
        return head.eval().requires_grad_(False)

    def _with(self, head: PatchAlignment) -> Self:
        state = {key.replace(".", "_"): value.detach().cpu().clone() for key, value in head.state_dict().items()}
        assert state.keys() == set(_TENSORS)
        return replace(self, **state)

    def _trained(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None) -> PatchAlignment:
        images, captions = reference.images, reference.captions
        if images is None or captions is None or captions.image_row is None:
            raise ConfigError(
                "pacl needs a trained head (--addon pacl:head=RUN, from a run with [loss.patch_alignment]), or images "
                "with their captions to train one on; --reference names such a set."
            )
        tokens = images.vectors.patch_tokens
        assert tokens is not None
        texts, rows = captions.vectors.pooled, captions.image_row
        with torch.inference_mode(False), torch.random.fork_rng([]):
            torch.manual_seed(reference.seed)
            head = PatchAlignment(tokens.shape[2], embedder.embed_dim, self.attention_scale)
            scale = torch.tensor(embedder.logit_scale)
        described = _captions_of(rows, len(images))
        chosen = [row for row, own in enumerate(described) if own]

        def loss(items: Tensor, epoch: int) -> Tensor:
            some = [chosen[item] for item in items.tolist()]
            # Another caption of each image in every epoch.
            own = [described[row][epoch % len(described[row])] for row in some]
            return patch_alignment_loss(head(tokens[some].float()), texts[own], scale, head.attention_scale)

        schedule = Schedule(self.epochs, self.lr, batch_size=self.batch_size, weight_decay=WEIGHT_DECAY)
        train(list(head.parameters()), schedule, len(chosen), loss, reference.seed, progress)
        return head


_TENSORS = ("first_weight", "first_bias", "second_weight", "second_bias", "skip_weight", "skip_bias",
            "log_attention_scale")  # fmt: skip


def _captions_of(image_row: Tensor, num_images: int) -> list[list[int]]:
    """The captions of each image."""
    found: list[list[int]] = [[] for _ in range(num_images)]
    for caption, row in enumerate(image_row.tolist()):
        found[row].append(caption)
    return found


ADDON = Pacl
