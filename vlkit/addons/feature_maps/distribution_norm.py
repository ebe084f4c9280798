"""Distribution normalisation (DN): subtract a share of the mean image and of the mean text.

    S(x, y) = (x - lam mu_x) . (y - lam mu_y)

Retrieval: unit features, subtracted, not normalised again. Classification: raw features, subtracted, then brought to
unit norm; mu_y is the mean of the class weights themselves.

Source: Zhou et al. 2023, "Test-Time Distribution Normalization for Contrastively Learned Vision-language Models",
arXiv:2302.11084, and the authors' code. DN in the paper is lam = 0.5, DN* (all that the code has) lam = 0.25; 100
random images and, drawn apart, 100 random texts of a split that is not the test split.
Differs: the code puts `A photo depicts ` before every text; here that is an option of the evaluators (`--text-prefix`
to retrieve, part of the templates to classify), off by default. The length of text features before normalisation is
not kept, so on the text side raw is unit.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.bank import sampled
from vlkit.addons.base import FeatureMap, Need, Vectors, learned
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class DistributionNorm(FeatureMap):
    """Subtracts a share of the means.

    Attributes:
        lam: share of the means that is subtracted; 0 changes nothing (in classification: nothing but lengths).
        normalise: "before" (the retrieval form), "after" (the classification form), or "auto": by the task.
        bank_size: images, and texts, drawn by the reference's seed.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"unlabelled_images"})
    uses: ClassVar[frozenset[Need]] = frozenset({"captions", "class_names"})

    lam: float = 0.5
    normalise: Literal["auto", "before", "after"] = "auto"
    bank_size: int = 100
    image_mean: Tensor | None = learned()  # (D,)
    text_mean: Tensor | None = learned()  # (D,)

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """The two means."""
        form = self.normalise
        if form == "auto":
            form = "after" if reference.task == "classification" else "before"
        assert reference.images is not None
        vectors = reference.images.vectors
        images = sampled(_sided(vectors, form), self.bank_size, reference.seed, "unlabelled images")
        assert images is not None
        return replace(self, normalise=form, image_mean=images.mean(0), text_mean=self._text_mean(reference))

    def map(self, images: Vectors, texts: Vectors) -> tuple[Vectors, Vectors]:
        """Both sides."""
        assert self.image_mean is not None and self.text_mean is not None
        return self._moved(images, self.image_mean), self._moved(texts, self.text_mean)

    def _moved(self, side: Vectors, mean: Tensor) -> Vectors:
        moved = _sided(side, self.normalise).pooled - self.lam * mean
        after = self.normalise == "after"
        return side.with_pooled(F.normalize(moved, dim=-1) if after else moved, unit=after)

    def _text_mean(self, reference: "Reference") -> Tensor:
        if reference.task == "classification" and reference.weights is not None:
            return reference.weights.vectors.mean(0)
        texts = None if reference.captions is None else reference.captions.vectors
        # Another seed: the texts are drawn independently of the images.
        bank = sampled(texts, self.bank_size, reference.seed + 1, "captions")
        if bank is None:
            raise ConfigError(
                "distribution_norm needs the class names (to classify) or captions of another split than the test "
                "split (to retrieve); --reference names them."
            )
        return bank.mean(0)


def _sided(side: Vectors, form: str) -> Vectors:
    """Raw features where the form asks for them and their lengths are known."""
    return side if form == "before" or side.norm is None else replace(side, pooled=side.raw, unit=False)


ADDON = DistributionNorm
