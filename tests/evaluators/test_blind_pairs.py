"""MMVP's score by hand and at chance, its files in miniature, and the miner against all pairs in a loop."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from eval.blind_pairs import BlindPairsEvaluator, PairSet, StatedPair, own_image_wins, read_mmvp
from eval.mined_pairs import MinedPairsEvaluator, mine_blind_pairs, pair_thresholds
from vlkit.data.records import ImageRef, Record
from vlkit.errors import ConfigError, DataError


def unit(rows: int, seed: int, dim: int = 16) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def record(key: str, *captions: str) -> Record:
    return Record(key, ImageRef(data=b""), captions)


def test_score_by_hand() -> None:
    scores = torch.tensor([[[0.3, 0.2], [0.1, 0.4]], [[0.3, 0.2], [0.5, 0.4]], [[0.2, 0.2], [0.1, 0.1]]])
    # Statement 2 of the second pair prefers image 1; identical images score nothing.
    assert own_image_wins(scores).tolist() == [[True, True], [True, False], [False, False]]
    # Images exchanged together with their statements.
    assert own_image_wins(scores.flip(1, 2)).tolist() == [[True, True], [False, True], [False, False]]


def test_random_features_score_a_quarter() -> None:
    scores = unit(8000, 0).unflatten(0, (-1, 2)) @ unit(8000, 1).unflatten(0, (-1, 2)).transpose(1, 2)
    assert own_image_wins(scores).all(1).double().mean().item() == pytest.approx(0.25, abs=0.02)


def test_patterns_and_unreadable_images(named_vectors: Callable[..., Any]) -> None:
    a, b, c = record("a"), record("b"), Record("c", ImageRef(data=b"broken"))
    pairs = (
        StatedPair("1", (a, b), ("is a", "is b"), "count"),
        StatedPair("2", (b, a), ("is a", "is b"), "text"),
        StatedPair("3", (a, c), ("is a", "is b"), "text"),
        StatedPair("4", (a, a), ("is a", "is b"), "text"),
    )
    vectors = {"a": [1.0, 0.0], "b": [0.0, 1.0], "x is a": [0.9, 0.1], "x is b": [0.1, 0.9]}
    evaluation = BlindPairsEvaluator(PairSet(pairs, "by hand"), "x {}").run(named_vectors(vectors))
    assert evaluation.metrics["count/pair_accuracy"] == 1 and evaluation.metrics["text/pair_accuracy"] == 0
    assert evaluation.metrics["pair_accuracy"] == pytest.approx(1 / 3)
    assert evaluation.metrics["patterns/pair_accuracy"] == 0.5
    assert evaluation.counts["pairs_of_unreadable_images"] == 1
    with pytest.raises(ConfigError, match="exactly one"):
        BlindPairsEvaluator(PairSet(pairs, ""), "x")


def test_mmvps_files(tmp_path: Path) -> None:
    folder = tmp_path / "MLLM_VLM Images" / "Texts"
    folder.mkdir(parents=True)
    for number in (1, 2, 3):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.jpg")
    rows = ["Question ID,Type,Statement", '1,Texts,"a sign, red"', "2,Texts,a cup", "3,Texts,x", "4,Texts,y"]
    (tmp_path / "Questions.csv").write_text("\n".join(rows) + "\n")
    found = read_mmvp(tmp_path)
    (pair,) = found.pairs
    assert pair.statements == ("a sign, red", "a cup") and pair.pattern == "Texts" and found.left_out[0][1] == 1
    (tmp_path / "Questions.csv").write_text("\n".join(rows[:4]) + "\n")
    with pytest.raises(DataError, match="3 rows behind the header"):
        read_mmvp(tmp_path)


def test_miner_against_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.mined_pairs._CELLS", 7 * 40)  # several blocks
    first, second = unit(40, 2, 4), unit(40, 3, 4)
    found = mine_blind_pairs(first, second, above=0.5, below=0.2)
    expected = {
        (i, j): (float(first[i] @ first[j]), float(second[i] @ second[j]))
        for i in range(40)
        for j in range(i + 1, 40)
        if first[i] @ first[j] > 0.5 and second[i] @ second[j] < 0.2
    }
    assert len(expected) > 20 and {(one.first, one.second) for one in found} == expected.keys()
    for one in found:
        assert (one.alike, one.apart) == pytest.approx(expected[one.first, one.second], abs=1e-6)
    gaps = [one.alike - one.apart for one in found]
    assert gaps == sorted(gaps, reverse=True) and mine_blind_pairs(first, second, 0.5, 0.2, most=3) == found[:3]
    # One model alone is blind to nothing it can tell.
    assert mine_blind_pairs(first, first, above=0.6, below=0.5) == []
    with pytest.raises(ValueError, match="not finite"):
        mine_blind_pairs(first, second * torch.nan)


def test_thresholds_by_share() -> None:
    first, second = unit(30, 4), unit(30, 5)
    above, below = pair_thresholds(first, second, 0.1)
    pairs = [(i, j) for i in range(30) for j in range(i + 1, 30)]
    one = sorted((float(first[i] @ first[j]) for i, j in pairs), reverse=True)
    two = sorted(float(second[i] @ second[j]) for i, j in pairs)
    assert above == pytest.approx(one[round(0.1 * len(pairs)) - 1]) and below == pytest.approx(two[(len(two) - 1) // 2])
    with pytest.raises(ConfigError, match=r"within \(0,1\)"):
        pair_thresholds(first, second, 1.0)


def test_mined_pairs_are_scored_by_their_captions(named_vectors: Callable[..., Any]) -> None:
    records = [record("a", "one", "same"), record("b", "two", "same"), record("c", "three")]
    blind = named_vectors({"a": [1.0, 0.05], "b": [1.0, -0.05], "c": [0.0, 1.0], "one": [1.0, 1.0], "two": [1.0, -1.0]})
    seeing = named_vectors({"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [-1.0, 0.0]})
    evaluation = MinedPairsEvaluator(records, seeing).run(blind)
    assert evaluation.counts["mined_pairs"] == 1 and evaluation.metrics["mined_share"] == pytest.approx(1 / 3)
    assert evaluation.metrics["pair_accuracy"] == 1
    bare = [record(name) for name in "abc"]
    assert set(MinedPairsEvaluator(bare, seeing).run(blind).metrics) == {"mined_share"}
    assert MinedPairsEvaluator(records, blind).run(blind).counts["mined_pairs"] == 0


def test_command(vlkit_data: Path, general_encoder: Path, tmp_path: Path, call_vlkit: Callable[..., Any]) -> None:
    import timm
    import torch as t
    from safetensors.torch import save_file

    t.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    called = call_vlkit(
        "eval", "mine-pairs", "--model", f"local-dir:{general_encoder}", "--data", vlkit_data / "coco_small",
        "--second", f"timm:test_vit@{tmp_path / 'vit.safetensors'}", "--share", "0.02",
        "--out", tmp_path / "r.jsonl", "--json",
    )  # fmt: skip
    assert called.code == 0, called.err
    line = json.loads(called.out)
    assert line["counts"]["mined_pairs"] > 20 and 0 <= line["metrics"]["pair_accuracy"] <= 1
