import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlkit.addons.merges.arithmetic import Arithmetic
from vlkit.addons.merges.weicom import WeiCom
from vlkit.addons.reference import Reference
from vlkit.errors import ConfigError


def drawn(seed: int, rows: int = 4, columns: int = 9) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_against_a_loop_from_the_paper(tiny_source: Any) -> None:
    text, image = drawn(0), drawn(1)
    merged = WeiCom(share=0.3).fit(Reference(task="retrieval"), tiny_source()).merge([text, image])
    for row in range(4):
        parts = [(0.3, text[row].tolist()), (0.7, image[row].tolist())]
        for column in range(9):
            expected = sum(
                weight * statistics.NormalDist(statistics.mean(line), statistics.stdev(line)).cdf(line[column])
                for weight, line in parts
            )
            assert merged[row, column].item() == pytest.approx(expected, abs=1e-5)


def test_an_affine_change_of_either_similarity_changes_nothing() -> None:
    text, image = drawn(2), drawn(3)
    plain = WeiCom(share=0.4).merge([text, image])
    assert torch.allclose(WeiCom(share=0.4).merge([0.05 * text + 0.2, image]), plain, atol=1e-5)
    assert torch.allclose(WeiCom(share=0.4).merge([text, 7 * image - 3]), plain, atol=1e-5)
    # The idea itself: the plain mean does change.
    assert not torch.allclose(Arithmetic().merge([0.05 * text + 0.2, image]), Arithmetic().merge([text, image]))


def test_words_count_although_images_are_more_alike() -> None:
    # Image similarities spread over 0.6, those of the words over 0.04, as in CLIP. Item 0 is the image itself, item 1
    # shows the same with what the words say, items 2 and 3 show other things.
    image = torch.tensor([[0.95, 0.80, 0.40, 0.35]])
    text = torch.tensor([[0.20, 0.24, 0.24, 0.20]])
    assert Arithmetic().merge([text, image]).argmax() == 0
    assert WeiCom().merge([text, image]).argmax() == 1


def test_edges() -> None:
    text, image = drawn(4), drawn(5)
    assert torch.equal(WeiCom(share=1.0).merge([text, image]).argsort(), text.argsort())
    assert torch.equal(WeiCom(share=0.0).merge([text, image]).argsort(), image.argsort())
    constant = torch.full((2, 9), math.pi / 10)
    assert (WeiCom().merge([constant, constant]) == 0.5).all()
    assert (WeiCom().merge([constant[:, :1], constant[:, :1]]) == 0.5).all()
    with pytest.raises(ConfigError, match="joins words and an image"):
        WeiCom().merge([text])
    with pytest.raises(ConfigError, match="share is 2"):
        WeiCom(share=2.0).merge([text, image])


def test_search_by_words_and_an_image(
    vlkit_data: Path, general_encoder: Path, tmp_path: Path, call_vlkit: Callable[..., Any]
) -> None:
    photos = sorted((vlkit_data / "coco_small" / "val2017").glob("*.jpg"))[:8]
    for path in photos:
        (tmp_path / path.name).symlink_to(path)
    model = f"local-dir:{general_encoder}"
    assert call_vlkit("embed", tmp_path, "--model", model, "--out", tmp_path / "features").code == 0
    both = ("retrieve", tmp_path / "features", "--text", "a street", "--image", photos[0], "--json")
    called = call_vlkit(*both, "--addon", "weicom:share=0.0")
    assert called.code == 0, called.err
    found = json.loads(called.out)
    # Without the words the image itself comes first, and scores are on the scale of a distribution.
    assert found["results"][0]["id"] == photos[0].name and found["query"]["addons"] == "weicom"
    assert all(0 <= one["score"] <= 1 for one in found["results"])
    assert "is not fitted" in call_vlkit(*both, "--addon", "freedom").err
