"""The second look: fp32's decisions, and only close calls are encoded twice."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from vlkit.addons.classifier import ZeroShotClassifier
from vlkit.addons.exchange import ClassWeights
from vlkit.classify import Classified, SecondLook, Unreadable, classify_images, gather_images
from vlkit.classify.close_calls import NUM_MEASURED
from vlkit.data.records import Record
from vlkit.features.cache import FeatureCache
from vlkit.features.source import CachedEmbedder, open_sources
from vlkit.models.bf16 import bf16_copy
from vlkit.models.embedder import EmbeddedChunk, Embedder
from vlkit.models.load import pick_precision
from vlkit.models.open_clip_encoder import OpenClipEncoder, build_encoder
from vlkit.models.saved import save_encoder

ARCHITECTURE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
NUM_IMAGES, NUM_CLASSES = 400, 60


class Counting(OpenClipEncoder):
    """An encoder that counts the images it encodes."""

    num_images = 0

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        self.num_images += len(images)
        return super().encode_image(images, normalize)


@pytest.fixture(scope="module")
def encoder() -> Counting:
    torch.manual_seed(0)
    built = build_encoder(ARCHITECTURE).eval()
    return Counting(built.model, built.architecture)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, ...]:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        blocks = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.png")
    return gather_images([folder]).records


@pytest.fixture
def pair(encoder: Counting, tmp_path: Path) -> tuple[CachedEmbedder, CachedEmbedder]:
    """The same model in bf16 and in fp32, both with an empty cache, counting from nought."""
    encoder.num_images = 0
    half = bf16_copy(encoder)
    cache = FeatureCache(tmp_path / "cache")
    return CachedEmbedder(lambda: Embedder(half, "half"), cache), CachedEmbedder(
        lambda: Embedder(encoder, "full"), cache
    )


@pytest.fixture(scope="module")
def features(encoder: Counting, records: tuple[Record, ...]) -> Tensor:
    return Embedder(encoder, "full").embed_images(records)


def close_classes(features: Tensor, scale: float = 50.0, family: str = "softmax") -> ZeroShotClassifier:
    """Classes around the middle of the images, so near to each other that many an image lies between two."""
    drawn = torch.randn(NUM_CLASSES, features.shape[1], generator=torch.Generator().manual_seed(1))
    vectors = normalize(features.mean(0) + 0.05 * drawn, dim=1)
    names = tuple(f"class {number}" for number in range(NUM_CLASSES))
    return ZeroShotClassifier(names, ClassWeights(vectors, torch.arange(NUM_CLASSES)), scale, 0.0, family)  # type: ignore[arg-type]


def counted(source: CachedEmbedder) -> int:
    found = source.embedder.encoder
    assert isinstance(found, Counting)
    return found.num_images


def decisions(found: Iterator[Classified | Unreadable]) -> list[tuple[str, bool]]:
    return [(item.classes[0][0], item.unsure) for item in found if isinstance(item, Classified)]


def test_classes_are_those_of_fp32_and_only_close_calls_are_encoded_twice(
    pair: tuple[CachedEmbedder, CachedEmbedder], features: Tensor, records: tuple[Record, ...]
) -> None:
    half, full = pair
    classifier = close_classes(features)
    expected = classifier.weights.scores(features).argmax(1)
    rounded = half.embed_images(records)
    wrong = classifier.weights.scores(rounded).argmax(1) != expected
    assert wrong.any()  # bf16 alone would not do

    look = SecondLook(full, classifier)
    found = decisions(classify_images(half, classifier, records, top=1, second_look=look))
    assert found == [(f"class {best}", False) for best in expected.tolist()]
    assert counted(half) == NUM_IMAGES  # the cache has them from above
    assert counted(full) == look.num_again
    close = look.is_close(rounded)
    assert close[wrong].all()
    # What was measured on stands among the least safe, close or not.
    assert close.sum() <= look.num_again <= close.sum() + NUM_MEASURED < NUM_IMAGES / 2


def test_a_second_run_encodes_nothing_and_another_list_little(
    pair: tuple[CachedEmbedder, CachedEmbedder], features: Tensor, records: tuple[Record, ...]
) -> None:
    half, full = pair
    classifier, results = close_classes(features), []
    for batch_size in (7, 64, 1000):  # the cache hands over other chunks than the encoder
        look = SecondLook(full, classifier)
        found = classify_images(half, classifier, records, top=1, batch_size=batch_size, second_look=look)
        results.append((decisions(found), look.num_again))
        assert counted(full) == look.num_again
    assert counted(half) == NUM_IMAGES
    assert results[0] == results[1] == results[2]
    other = ZeroShotClassifier.build(full, ["a dog", "a cat", "a red car"])
    look = SecondLook(full, other)
    list(classify_images(half, other, records, second_look=look))
    assert counted(half) == NUM_IMAGES


@pytest.mark.parametrize(("scale", "family"), [(50.0, "softmax"), (2.0, "sigmoid")])
def test_unsure_is_what_fp32_finds_unsure(
    pair: tuple[CachedEmbedder, CachedEmbedder],
    features: Tensor,
    records: tuple[Record, ...],
    scale: float,
    family: str,
) -> None:
    half, full = pair
    classifier = close_classes(features, scale, family)
    best = classifier.probabilities(features).amax(1)
    rounded = half.embed_images(records)
    # A threshold that bf16 puts some image on the other side of.
    other = classifier.probabilities(rounded).amax(1)
    limit = float(((best + other) / 2)[(best - other).abs().argmax()])
    assert ((best < limit) != (other < limit)).any()
    look = SecondLook(full, classifier, limit)
    found = decisions(classify_images(half, classifier, records, min_probability=limit, second_look=look))
    assert [unsure for _, unsure in found] == (best < limit).tolist()


def test_distance_from_a_plane_by_hand() -> None:
    # Between (1,0) and (0,1) the plane is the diagonal; (0.8,0.6) lies 0.2/sqrt(2) from it. (0.6,0.8), a synonym of
    # the first class, is no rival and the nearest vector: the plane to (0,1) is then (0.6,-0.2) / sqrt(0.4).
    weights = ClassWeights(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.arange(2))
    look = SecondLook(None, ZeroShotClassifier(("a", "b"), weights, 1.0))  # type: ignore[arg-type]
    x = torch.tensor([[0.8, 0.6]])
    assert look.distances(x).nearest().item() == pytest.approx(0.2 / math.sqrt(2))
    weights = ClassWeights(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]), torch.tensor([0, 1, 0]))
    look = SecondLook(None, ZeroShotClassifier(("a", "b"), weights, 1.0))  # type: ignore[arg-type]
    found = look.distances(x)
    assert found.own.item() == 0 and found.rival.tolist() == [[False, True, False]]
    assert found.nearest().item() == pytest.approx((0.6 * 0.8 - 0.2 * 0.6) / math.sqrt(0.4))


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_no_error_within_the_bound_changes_what_is_not_close(reduce: str) -> None:
    drawn = torch.Generator().manual_seed(2)
    vectors = normalize(torch.randn(12, 8, generator=drawn), dim=1).double()
    weights = ClassWeights(vectors, torch.arange(12) // 2, reduce=reduce)  # type: ignore[arg-type]
    classifier = ZeroShotClassifier(tuple("abcdef"), weights, 30.0)
    features = normalize(torch.randn(400, 8, generator=drawn), dim=1).double()
    look = SecondLook(None, classifier, min_probability=0.5)  # type: ignore[arg-type]
    look.bound = 0.03
    close, before = look.is_close(features), classifier.probabilities(features)
    assert 0.05 < close.double().mean() < 0.9
    changed = torch.zeros(400, dtype=torch.bool)
    for _ in range(200):  # no error longer than the bound reaches further than the bound across any plane
        error = 0.03 * normalize(torch.randn(400, 8, generator=drawn), dim=1).double()
        after = classifier.probabilities(features + error)
        changed |= before.argmax(1) != after.argmax(1)
        changed |= (before.amax(1) < 0.5) != (after.amax(1) < 0.5)
    assert changed.any() and not changed[~close].any()


def test_a_file_that_vanishes_before_the_second_look_is_unreadable(
    encoder: Counting, records: tuple[Record, ...], features: Tensor, tmp_path: Path
) -> None:
    full = Embedder(encoder, "full")
    classifier = close_classes(features)
    look = SecondLook(full, classifier)
    copies = [tmp_path / f"{number}.png" for number in range(3)]
    for path, record in zip(copies, records, strict=False):
        path.write_bytes(record.image.read())
    found = gather_images([tmp_path]).records
    chunk = next(full.iterate_embeddings(found))
    copies[1].unlink()
    settled = list(look.settle([chunk], found))
    look.bound = 10.0  # all are close now
    (again,) = look.settle([chunk], found)
    assert again.rows == [0, 2] and [row for row, _ in again.failures] == [1]
    assert len(again.embeddings) == len(again.norms) == 2
    assert sum(len(one.rows) + len(one.failures) for one in settled) == 3
    nothing = EmbeddedChunk([], torch.empty(0, 32), [(0, "broken")], torch.empty(0))
    assert next(SecondLook(full, classifier).settle([nothing], found[:1])).failures == [(0, "broken")]


def test_one_precision_is_opened_where_two_save_nothing(
    encoder: Counting, records: tuple[Record, ...], tmp_path: Path
) -> None:
    name = f"local-dir:{save_encoder(encoder, tmp_path / 'model')}"
    cache = FeatureCache(tmp_path / "cache")
    both = open_sources(name, records, "cpu", cache)
    has_bf16 = pick_precision("auto", torch.device("cpu")) == "bf16"
    assert (both.first is not both.exact) == has_bf16
    assert both.exact.card.precision == "fp32"
    few = open_sources(name, records[:5], "cpu", cache)
    assert few.first is few.exact and few.exact.card.precision == "fp32"
    for precision in ("fp32", "bf16"):
        one = open_sources(name, records, "cpu", cache, precision=precision)
        assert one.first is one.exact and one.first.card.precision == precision
    few.exact.embed_images(records)
    known = open_sources(name, records, "cpu", cache)
    assert known.first is known.exact and "embedder" not in vars(known.exact)  # nothing is left to encode
