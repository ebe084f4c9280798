import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vlkit.addons.base import SLOTS, AddOn
from vlkit.addons.exchange import Vectors
from vlkit.addons.gallery_bias.top_k_mean import TopKMean
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Captions, Reference
from vlkit.addons.registry import addon_rows, find_method, library_rows, make_addon
from vlkit.addons.saved import load_addon, save_addon
from vlkit.errors import CheckpointError, ConfigError, GalleryError


def test_every_row_leads_to_its_class() -> None:
    for name, row in addon_rows().items():
        method = find_method(name)
        assert issubclass(method, AddOn) and method.slot == row.slot and row.name == name
        assert "Source:" in (__import__(method.__module__, fromlist=["x"]).__doc__ or ""), name
        # Settings have defaults: `--addon NAME` alone works, and so does the leaderboard.
        assert method().settings() is not None
        assert all(row), row
    assert {row.slot for row in addon_rows().values()} <= set(SLOTS)
    assert {"clip", "sigmoid"} <= {row.name for row in library_rows()}


def test_settings_are_parsed_by_their_type() -> None:
    tip: Any = make_addon("tip_adapter:alpha=2,beta=none")
    assert (tip.alpha, tip.beta) == (2.0, None)
    bias: Any = make_addon("top_k_mean:k=16,bank_size=40")
    assert (bias.k, bias.bank_size, bias.alpha) == (16, 40, 0.75)
    norm: Any = make_addon("distribution_norm:normalise=after")
    assert norm.normalise == "after"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tip_adaptor", "Did you mean tip_adapter"),
        ("tip_adapter:alfa=2", "Did you mean alpha"),
        ("tip_adapter:keys=2", "has no setting 'keys'"),
        ("tip_adapter:fitted=2", "has no setting 'fitted'"),
        ("tip_adapter:alpha=two", "expected float"),
        ("tip_adapter:alpha", "write key=value"),
        ("tip_adapter:alpha=1,alpha=2", "given alpha twice"),
        ("distribution_norm:normalise=afer", "Did you mean after"),
        ("nowhere.py", "There is no file nowhere.py"),
        ("", "An add-on without a name"),
    ],
)
def test_what_does_not_parse_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_addon(text)


@pytest.fixture
def fitted(tiny_source: Any) -> TopKMean:
    texts = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    captions = Captions(("t",) * 9, Vectors("text", texts), "train")
    return TopKMean(k=3).fit(Reference(task="retrieval", captions=captions), tiny_source())


def test_saved_and_loaded_it_does_the_same(fitted: TopKMean, tmp_path: Path, tiny_source: Any) -> None:
    save_addon(fitted, tmp_path / "bias")
    loaded = load_addon(tmp_path / "bias")
    assert isinstance(loaded, TopKMean) and loaded.key == fitted.key and loaded.fitted == fitted.fitted
    gallery = Vectors("image", torch.randn(4, 16))
    assert torch.equal(loaded.bias(gallery), fitted.bias(gallery))
    assert make_addon(str(tmp_path / "bias")).key == fitted.key
    record = json.loads((tmp_path / "bias" / "addon.json").read_text())
    assert record["method"] == "top_k_mean" and record["fitted"]["seen"] == {"captions": "train: 9"}
    with pytest.raises(GalleryError, match="do not go together"):
        Pipeline([loaded]).retrieval(gallery, gallery, tiny_source(name="another"))


def test_damaged_folders_are_errors(fitted: TopKMean, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no add-on"):
        load_addon(tmp_path)
    folder = save_addon(fitted, tmp_path / "bias")
    weights = (folder / "addon.safetensors").read_bytes()
    (folder / "addon.safetensors").write_bytes(weights[:-20])
    with pytest.raises(CheckpointError, match="damaged"):
        load_addon(folder)
    (folder / "addon.safetensors").write_bytes(weights)
    record = json.loads((folder / "addon.json").read_text())
    for change, message in (
        ({"method": "top_k_meen"}, "There is no add-on"),
        ({"values": {"sharpness": 2}}, "has no sharpness"),
        ({"fitted": None}, "damaged"),
    ):
        (folder / "addon.json").write_text(json.dumps(record | change))
        with pytest.raises((CheckpointError, ConfigError), match=message):
            load_addon(folder)
    with pytest.raises(ConfigError, match="not fitted"):
        save_addon(TopKMean(), tmp_path / "other")


NEWCOMER = '''
"""Source: my own idea. A bias by length of the path, which is of no use to anybody."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlkit.addons.base import GalleryBias, Need


@dataclass(frozen=True)
class FirstChannel(GalleryBias):
    """Subtracts the first channel of each gallery item."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    strength: float = 1.0

    def learn(self, reference, embedder, progress=None):
        return self

    def bias(self, gallery):
        return self.strength * gallery.pooled[:, 0]


ADDON = FirstChannel
'''


def test_a_newcomer_adds_a_method_in_a_file_of_their_own(tmp_path: Path, tiny_source: Any, toy_records: Any) -> None:
    from eval.classification import ClassificationEvaluator

    path = tmp_path / "first_channel.py"
    path.write_text(NEWCOMER)
    source, records = tiny_source(), toy_records(["cat", "dog", "sea horse"], 5)
    evaluator = ClassificationEvaluator(records, ["cat", "dog", "sea horse"], templates="photo")
    plain = evaluator.run(source)
    none = evaluator.run(source, Pipeline([make_addon(f"{path}:strength=0")]))
    strong = evaluator.run(source, Pipeline([make_addon(f"{path}:strength=50")]))
    assert none.metrics == plain.metrics and none.intervals == plain.intervals
    assert strong.metrics["accuracy@1"] < plain.metrics["accuracy@1"]
    assert strong.protocol["addons"][0]["name"] == "first_channel"
    assert strong.protocol["transductive"] is False and "addons" not in plain.protocol
