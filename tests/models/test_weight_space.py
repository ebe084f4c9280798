"""WiSE-FT: the ends bit for bit, the middle by hand, other architectures refused."""

import pytest
import torch

from vlkit.errors import ModelError
from vlkit.models.open_clip_encoder import OpenClipEncoder, build_encoder
from vlkit.models.weight_space import interpolate, interpolate_weights

RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1}


def make(seed: int, width: int = 24) -> OpenClipEncoder:
    torch.manual_seed(seed)
    return build_encoder({"embed_dim": 16, "vision_cfg": RESNET, "text_cfg": {**TEXT, "width": width}}).eval()


def test_the_ends_are_the_models_bit_for_bit_and_neither_is_changed() -> None:
    start, tuned = make(0), make(1)
    tuned.model.visual.bn1.num_batches_tracked.fill_(7)
    before = [{name: value.clone() for name, value in one.weights().items()} for one in (start, tuned)]
    for alpha, model in ((0.0, start), (1.0, tuned)):
        found = interpolate(start, tuned, alpha).weights()
        assert all(torch.equal(found[name], value) for name, value in model.weights().items())
    middle = interpolate(start, tuned, 0.25)
    for name, value in middle.weights().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * before[0][name] + 0.25 * before[1][name], rtol=1e-5, atol=1e-7)
    assert middle.weights()["visual.bn1.num_batches_tracked"] == 0  # of the nearer one
    for old, one in zip(before, (start, tuned), strict=True):
        assert all(torch.equal(one.weights()[name], value) for name, value in old.items())


def test_equal_weights_stay_as_they_are() -> None:
    value = {"w": torch.randn(50, generator=torch.Generator().manual_seed(0))}
    assert torch.equal(interpolate_weights(value, value, 0.3)["w"], value["w"])


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ModelError, match="same architecture can be mixed; these two differ in model_cfg"):
        interpolate(make(0), make(0, width=32), 0.5)
