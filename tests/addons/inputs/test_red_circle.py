from typing import Any

import pytest
import torch

from vlkit.addons.inputs.red_circle import RedCircle, box_scores
from vlkit.data.resizing import Box
from vlkit.errors import ConfigError, DataError

ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
HALF = {"top": 0.25, "left": 0.0, "height": 0.5, "width": 0.5}


@pytest.fixture(scope="module")
def source() -> Any:
    from vlkit.features.model_card import card_of
    from vlkit.features.source import CachedEmbedder
    from vlkit.models.embedder import Embedder
    from vlkit.models.open_clip_encoder import build_encoder

    torch.manual_seed(0)
    model = Embedder(build_encoder(ARCHITECTURE).eval(), "tiny")
    return CachedEmbedder(lambda: model, None, card_of(model))


def inside(size: int) -> torch.Tensor:
    """Pixels whose centre lies in the ellipse of HALF, one at a time."""
    out = torch.zeros(size, size, dtype=torch.bool)
    for row in range(size):
        for column in range(size):
            y, x = (row + 0.5) / size - 0.5, (column + 0.5) / size - 0.25
            out[row, column] = (y / 0.25) ** 2 + (x / 0.25) ** 2 <= 1
    return out


def test_a_red_line_around_the_box_and_nothing_else() -> None:
    images = torch.rand(2, 3, 40, 40)
    found = RedCircle(**HALF, line=2).edit_image(images)
    red = (found == torch.tensor([1.0, 0.0, 0.0])[:, None, None]).all(1)[0]
    assert torch.equal(found[:, :, ~red], images[:, :, ~red])
    assert red[20, 0] and red[20, 1] and not red[20, 3] and not red[20, 10], "two pixels at the left edge of the box"
    assert red[10, 10] and red[11, 10] and not red[12, 10] and not red[9, 10], "two at its top"
    assert not (red & ~inside(40)).any()


@pytest.mark.parametrize("view", ["grey", "blur"])
def test_only_the_outside_changes(view: Any) -> None:
    images = torch.rand(2, 3, 40, 40)
    found, mask = RedCircle(**HALF, view=view, blur=3.0).edit_image(images), inside(40)
    assert torch.equal(found[:, :, mask], images[:, :, mask])
    changed = (found != images).any(1)[0]
    assert changed[~mask].float().mean() > 0.99
    if view == "grey":
        assert (found[:, 0] == found[:, 1])[:, ~mask].all()
        expected = 0.299 * images[0, 0, 0, 39] + 0.587 * images[0, 1, 0, 39] + 0.114 * images[0, 2, 0, 39]
        assert found[0, 0, 0, 39] == pytest.approx(expected.item(), abs=1e-6)
    else:
        assert found[:, :, ~mask].std() < 0.2 * images.std()
        flat = RedCircle(**HALF, view="blur").edit_image(torch.full((1, 3, 40, 40), 0.3))
        assert torch.allclose(flat, torch.tensor(0.3)), "weights near the border sum to 1"


def test_scores_of_boxes(source: Any) -> None:
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    boxes = [Box(0, 0, 25, 35), Box(20, 30, 30, 40)]
    plain = box_scores(source, image, boxes, ["a dog", "a cat"], [], views=["grey"])
    squeezed = torch.nn.functional.interpolate(image[None].float(), (32, 32), mode="bicubic", antialias=True)
    edit = RedCircle(top=0.4, left=3 / 7, height=0.6, width=4 / 7, view="grey")
    drawn = edit.edit_image(squeezed.round().clamp(0, 255) / 255)
    expected = source.embedder.encoder.encode_image(drawn)[0] @ source.embed_texts(["a photo of a cat"])[0]
    assert plain[1, 1].item() == pytest.approx(expected.item(), abs=2e-3)
    # Subtracting a bank that is the expression itself leaves nothing; another one takes out what any text gets.
    assert box_scores(source, image, boxes, ["a dog"], ["a dog"]).abs().max() < 1e-6
    views = [box_scores(source, image, boxes, ["a dog"], [], views=[view]) for view in ("circle", "grey", "blur")]
    both = box_scores(source, image, boxes, ["a cat"], [])
    torch.testing.assert_close(
        box_scores(source, image, boxes, ["a dog"], ["a cat"]), torch.stack(views).mean(0) - both, atol=1e-6, rtol=0
    )


def test_the_place_of_the_circle_decides(source: Any) -> None:
    """Without the drawing all boxes of an image would have one score."""
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    found = box_scores(source, image, [Box(0, 0, 20, 20), Box(20, 20, 20, 20)], ["a dog"], [], views=["circle"])
    assert (found[0] - found[1]).abs() > 1e-4


def test_bad_boxes(source: Any) -> None:
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    with pytest.raises(DataError, match="not inside the image of 40 x 40"):
        box_scores(source, image, [Box(30, 0, 20, 20)], ["a dog"], [])
    with pytest.raises(DataError, match="0 boxes"):
        box_scores(source, image, [], ["a dog"], [])
    with pytest.raises(ConfigError, match="No view"):
        box_scores(source, image, [Box(0, 0, 9, 9)], ["a dog"], [], views=[])
    with pytest.raises(ConfigError, match="not inside the image; expected fractions"):
        RedCircle(top=0.6, height=0.5)
    with pytest.raises(ConfigError, match="line 0"):
        RedCircle(line=0)
