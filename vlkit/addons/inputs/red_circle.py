"""Red circle: an ellipse drawn around a region makes CLIP look there; boxes are scored for referring expressions.

    RedCircle(top=0.2, left=0.1, height=0.5, width=0.3)                # an input edit for a region of every image
    box_scores(source, image, boxes, ["the dog on the left"], others)  # (boxes, texts)

Three views of each box: the circle; colours inside and grey outside; sharp inside and blurred outside. The score of a
box and an expression is the mean cosine over the views, minus its mean over other expressions, which takes out what
makes a box attractive to any text.

Source: Shtedritski, Rupprecht and Vedaldi 2023, "What does CLIP know about a red circle? Visual prompt engineering for
VLMs", ICCV, arXiv:2304.06712. No code was released; views, line and texts follow the re-implementation in FGVP (Yang
et al. 2023, arXiv:2306.04356): ellipse inscribed in the box, 2 pixels of pure red drawn after resizing, a Gaussian
blur of 100 pixels, "a photo of {expression}".
Differs: Line width and size of the original's circle are not published. The mean over views in place of their sum, so
that scores stay on the scale of the cosine; one encoder. The whole image is squeezed into the model's square: a centre
crop would cut boxes off. Which other expressions are subtracted is the caller's choice: those of the test split, as in
FGVP, make the result transductive in the texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor

from vlkit.addons.base import InputEdit
from vlkit.contracts import Progress
from vlkit.data.resizing import Box
from vlkit.errors import ConfigError, DataError
from vlkit.features.source import FeatureSource

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference

View = Literal["circle", "grey", "blur"]
VIEWS: tuple[View, ...] = ("circle", "grey", "blur")
TEMPLATE = "a photo of {}"
# The share of red, green and blue in a grey value. Source: ITU-R BT.601, as pillow converts.
_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class RedCircle(InputEdit):
    """Marks a region of an image; the box is given in fractions of its sides, the whole image by default.

    Attributes:
        top, left, height, width: of the box.
        view: "circle" draws the line; "grey" and "blur" leave the inside as it is and change the outside.
        line: width of the line in pixels of the model's input, inside the ellipse.
        blur: standard deviation of the blur, in the same pixels.
    """

    top: float = 0.0
    left: float = 0.0
    height: float = 1.0
    width: float = 1.0
    view: View = "circle"
    line: float = 2.0
    blur: float = 100.0

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: a box that is not inside the image or is empty, a line or blur that is not above 0.
        """
        # A thousandth of grace: fractions of pixels do not add up to 1 exactly.
        inside = min(self.top, self.left) >= 0 and max(self.top + self.height, self.left + self.width) <= 1.001
        if not (inside and self.height > 0 and self.width > 0):
            raise ConfigError(
                f"red_circle: the box (top {self.top:g}, left {self.left:g}, height {self.height:g}, width "
                f"{self.width:g}) is not inside the image; expected fractions of its sides, e.g. top=0.25,height=0.5."
            )
        if not (self.line > 0 and self.blur > 0):
            raise ConfigError(f"red_circle: line {self.line:g} and blur {self.blur:g} must be above 0 pixels.")

    def learn(self, reference: "Reference", embedder: FeatureSource, progress: Progress | None = None) -> Self:
        """Nothing."""
        return self

    def edit_image(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) in [0,1] with the region marked."""
        inside = self._ellipse(images, shrink=0.0)
        if self.view == "circle":
            ring = inside & ~self._ellipse(images, shrink=self.line)
            red = images.new_tensor([1.0, 0.0, 0.0])[:, None, None]
            return torch.where(ring, red, images)
        outside = _grey(images) if self.view == "grey" else _blurred(images, self.blur)
        return torch.where(inside, images, outside)

    def _ellipse(self, images: Tensor, shrink: float) -> Tensor:
        """(S,S) bool: pixels whose centre is within the ellipse inscribed in the box, its axes `shrink` shorter."""
        size_y, size_x = images.shape[-2:]
        half_y, half_x = self.height * size_y / 2 - shrink, self.width * size_x / 2 - shrink
        if half_y <= 0 or half_x <= 0:
            return torch.zeros(size_y, size_x, dtype=torch.bool, device=images.device)
        y = torch.arange(size_y, device=images.device) + 0.5 - (self.top + self.height / 2) * size_y
        x = torch.arange(size_x, device=images.device) + 0.5 - (self.left + self.width / 2) * size_x
        return (y[:, None] / half_y).square() + (x[None] / half_x).square() <= 1


def _grey(images: Tensor) -> Tensor:
    weights = images.new_tensor(_GREY)[:, None, None]
    return (images * weights).sum(dim=-3, keepdim=True).expand_as(images)


def _blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur; near the border the weights that fall outside are left out."""

    def kernel(size: int) -> Tensor:
        place = torch.arange(size, device=images.device, dtype=images.dtype)
        return (-(place[:, None] - place).square() / (2 * sigma**2)).softmax(dim=1)

    return kernel(images.shape[-2]) @ images @ kernel(images.shape[-1]).T


def box_scores(
    source: FeatureSource,
    image: Tensor,
    boxes: Sequence[Box],
    expressions: Sequence[str],
    others: Sequence[str],
    views: Sequence[View] = VIEWS,
    template: str = TEMPLATE,
) -> Tensor:
    """How well each box of an image fits each expression.

    Args:
        source: the model.
        image: (3,H,W) uint8, in full size.
        boxes: n, in pixels of the image.
        expressions: m texts.
        others: texts whose mean score is subtracted from each box's; none: nothing is subtracted.
        views: drawings that are averaged.
        template: wraps every text; has one {}.

    Returns:
        (n,m); the best box of expression j is `scores[:, j].argmax()`.

    Raises:
        DataError: no box, no expression, or a box that is not inside the image.
        ConfigError: no view.
    """
    if not boxes or not expressions:
        raise DataError(f"There are {len(boxes)} boxes and {len(expressions)} expressions; expected at least one each.")
    if not views:
        raise ConfigError(f"No view to score; expected some of {', '.join(VIEWS)}.")
    texts = source.embed_texts([template.format(text) for text in (*expressions, *others)])
    encoder, device = source.embedder.encoder, source.embedder.device
    square = replace(encoder.preprocess, resize_mode="squash", crop_pct=1.0)(image)[None].float() / 255
    edits = [[_edit_of(box, image, view) for view in views] for box in boxes]
    drawn = torch.stack([edit.edit_image(square)[0] for row in edits for edit in row])
    with torch.inference_mode():
        features = [encoder.encode_image(part.to(device)).float().cpu() for part in drawn.split(64)]
    scores = (torch.cat(features) @ texts.T).unflatten(0, (len(boxes), len(views))).mean(dim=1)
    found, of_others = scores.split([len(expressions), len(others)], dim=1)
    corrected: Tensor = found - of_others.mean(dim=1, keepdim=True)
    return corrected if others else found


def _edit_of(box: Box, image: Tensor, view: View) -> RedCircle:
    height, width = image.shape[1:]
    fits = box.top >= 0 and box.left >= 0 and box.top + box.height <= height and box.left + box.width <= width
    if not fits or box.height < 1 or box.width < 1:
        raise DataError(f"{box} is not inside the image of {height} x {width} pixels.")
    return RedCircle(
        top=box.top / height, left=box.left / width, height=box.height / height, width=box.width / width, view=view
    )


ADDON = RedCircle
