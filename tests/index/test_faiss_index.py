"""The index against a search written out, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlkit.errors import GalleryError
from vlkit.features.feature_set import Fingerprint
from vlkit.index.faiss_index import EmbeddingIndex

MINE = Fingerprint({"weights": "a" * 64, "decoder": "fast"}, "run:mine")
OTHER = Fingerprint({"weights": "b" * 64, "decoder": "fast"}, "run:other")


def unit(count: int, dim: int = 24, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def names(count: int, begin: int = 0) -> list[str]:
    return [f"photo {number}.jpg" for number in range(begin, begin + count)]


@pytest.mark.parametrize(("kind", "tolerance"), [("flat", 1e-6), ("fp16", 1e-3)])
def test_search_is_exact(kind: str, tolerance: float) -> None:
    gallery, queries = unit(200), unit(7, seed=1)
    found = EmbeddingIndex.build(gallery, names(200), kind).search(queries, k=10)
    expected = (queries @ gallery.T).topk(10)
    torch.testing.assert_close(found.scores, expected.values, atol=tolerance, rtol=0)
    if kind == "flat":
        assert found.ids == [[f"photo {place}.jpg" for place in row] for row in expected.indices.tolist()]
    for row, ids in enumerate(found.ids):  # each score is that of its name
        places = [int(name.split()[1].split(".")[0]) for name in ids]
        torch.testing.assert_close(found.scores[row], queries[row] @ gallery[places].T, atol=tolerance, rtol=0)


def test_a_k_beyond_the_gallery_gives_all_of_it() -> None:
    found = EmbeddingIndex.build(unit(3), names(3)).search(unit(2), k=10)
    assert found.scores.shape == (2, 3) and all(sorted(ids) == names(3) for ids in found.ids)


@pytest.mark.parametrize("kind", ["flat", "fp16"])
def test_adding_and_removing_is_like_building_anew(kind: str) -> None:
    gallery = unit(30)
    index = EmbeddingIndex.build(gallery[:20], names(20), kind)
    index.add(gallery[20:], names(10, begin=20))
    assert index.remove(names(5, begin=3) + names(1, begin=29)) == 6
    keep = [*range(3), *range(8, 29)]
    anew = EmbeddingIndex.build(gallery[keep], [names(30)[place] for place in keep], kind)
    assert index.ids == anew.ids and len(index) == 24
    mine, theirs = index.search(unit(4, seed=2), 24), anew.search(unit(4, seed=2), 24)
    assert mine.ids == theirs.ids and mine.scores.equal(theirs.scores)
    torch.testing.assert_close(index.vectors(3, 5), gallery[8:10], atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["flat", "fp16"])
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    index = EmbeddingIndex.build(unit(20), names(20), kind, fingerprint=MINE, about={"plan": "p"})
    index.save(tmp_path / "index")
    index.remove(names(1))
    index.save(tmp_path / "index")  # takes the place of the first
    loaded = EmbeddingIndex.load(tmp_path / "index", MINE)
    assert (loaded.kind, loaded.ids, loaded.about, loaded.fingerprint) == (kind, index.ids, {"plan": "p"}, MINE)
    assert loaded.search(unit(2), 5).ids == index.search(unit(2), 5).ids
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    with pytest.raises(GalleryError, match=r"model run:mine.*model run:other.*weights: aaaaaaaaaaaa here, bbbb"):
        EmbeddingIndex.load(tmp_path / "index", OTHER)


def test_auto_takes_the_exact_kind_where_it_fits() -> None:
    assert EmbeddingIndex.build(unit(5), names(5)).kind == "flat"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.index_put_((torch.tensor([3]), torch.tensor([0])), torch.tensor(float("nan"))), "Row 3 .*not fin"),
        (lambda v: v.mul_(2), "Row 0 of the vectors is of length 2; expected unit norm"),
    ],
)
def test_features_that_give_no_ranking_are_refused(change: Any, message: str) -> None:
    with pytest.raises(GalleryError, match=message):
        EmbeddingIndex.build(change(unit(5)), names(5))
    index = EmbeddingIndex.build(unit(5), names(5))
    with pytest.raises(GalleryError, match=r"not finite|length 2"):
        index.search(change(unit(5)))
    with pytest.raises(GalleryError, match=r"not finite|length 2"):
        index.add(change(unit(5)), names(5, begin=5))
    assert len(index) == 5


def test_what_does_not_fit_is_refused() -> None:
    index = EmbeddingIndex.build(unit(5), names(5), fingerprint=MINE)
    for call, message in (
        (lambda: EmbeddingIndex.build(unit(0), []), "no vector"),
        (lambda: EmbeddingIndex.build(unit(5), names(5), "hnws"), "Unknown kind of index 'hnws'"),
        (lambda: EmbeddingIndex.build(unit(5), names(4)), "5 vectors, but 4 ids"),
        (lambda: EmbeddingIndex.build(unit(2), ["a", "a"]), "'a' stands twice"),
        (lambda: index.add(unit(1), names(1)), "'photo 0.jpg' stands twice"),
        (lambda: index.add(unit(1), ["new"], fingerprint=OTHER), "do not go together"),
        (lambda: index.add(unit(1, dim=8), ["new"]), r"shape \(1, 8\); expected \(N,24\)"),
        (lambda: index.search(unit(1, dim=8)), r"queries have shape \(1, 8\)"),
        (lambda: index.search(unit(1), k=0), "k is 0"),
        (lambda: index.remove(["photo 1.jpeg"]), "Did you mean photo 1.jpg"),
    ):
        with pytest.raises(GalleryError, match=message):
            call()
    assert len(index) == 5
    index.remove(names(5))
    with pytest.raises(GalleryError, match="The index is empty"):
        index.search(unit(1))


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(GalleryError, match="There is no index in"):
        EmbeddingIndex.load(tmp_path)
    EmbeddingIndex.build(unit(50), names(50)).save(tmp_path / "index")
    vectors = tmp_path / "index" / "vectors.faiss"
    whole = vectors.read_bytes()
    vectors.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GalleryError, match="is broken"):
        EmbeddingIndex.load(tmp_path / "index")
    vectors.write_bytes(whole)
    about = tmp_path / "index" / "index.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "num_items": 49}))
    with pytest.raises(GalleryError, match=r"does not hold what its index\.json says"):
        EmbeddingIndex.load(tmp_path / "index")


def test_a_large_gallery_is_added_in_chunks() -> None:
    gallery = np.tile(unit(1000, dim=8).numpy(), (70, 1))
    index = EmbeddingIndex.build(gallery, names(70_000))
    assert len(index) == 70_000 and index.search(gallery[:1], 1).scores.item() == pytest.approx(1)
