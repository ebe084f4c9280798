import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlkit.errors import CheckpointError
from vlkit.models.heads.patch_alignment import HEAD_FILE, PatchAlignment, load_head, save_head


def test_main_and_skip_branch() -> None:
    torch.manual_seed(0)
    head, tokens = PatchAlignment(5, 3), torch.randn(2, 4, 5)
    for row in range(2):
        for patch in range(4):
            x = tokens[row, patch]
            hidden = torch.clamp(head.first.weight @ x + head.first.bias, min=0)
            expected = head.second.weight @ hidden + head.second.bias + head.skip.weight @ x + head.skip.bias
            torch.testing.assert_close(head(tokens)[row, patch], expected)


def test_as_many_parameters_as_the_paper_says() -> None:
    count = sum(parameter.numel() for parameter in PatchAlignment(768, 512).parameters())
    assert 1.0e6 < count < 1.1e6


def test_the_scale_of_the_attention() -> None:
    fixed, learned = PatchAlignment(4, 4), PatchAlignment(4, 4, 3.0, learn_attention_scale=True)
    assert fixed.attention_scale.item() == pytest.approx(10) and learned.attention_scale.item() == pytest.approx(3)
    assert "log_attention_scale" not in dict(fixed.named_parameters())
    assert "log_attention_scale" in dict(learned.named_parameters())


def test_round_trip(tmp_path: Path) -> None:
    head, tokens = PatchAlignment(5, 3, 4.0, learn_attention_scale=True), torch.randn(2, 4, 5)
    save_head(head, tmp_path / HEAD_FILE, "abc")
    for place in (tmp_path, tmp_path / HEAD_FILE):
        found = load_head(place)
        assert found.encoder_weights == "abc" and torch.equal(found.head(tokens), head(tokens))
        assert found.head.attention_scale.item() == pytest.approx(4.0)


def test_what_is_no_head(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no patch alignment head"):
        load_head(tmp_path)
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no whole patch alignment head"):
        load_head(tmp_path / "broken")
    save_file({"other": torch.zeros(2)}, tmp_path / "other", metadata={"vlkit": json.dumps({"encoder_weights": "a"})})
    with pytest.raises(CheckpointError, match="no whole"):
        load_head(tmp_path / "other")
