"""GeneCIS's combiner: triplets by their rules, its formula by hand, a case that needs it, and the command."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eval.caption_triplets import Fact, Triplets, facts_of, mine_triplets, read_concreteness, read_facts
from eval.combiner import (
    Combiner,
    CombinerSettings,
    combiner_loss,
    held_out_recall,
    load_combiner,
    save_combiner,
    train_combiner,
)
from vlkit.data.records import ImageRef, Record
from vlkit.errors import CheckpointError, ConfigError, DataError

SUBJECTS, ATTRIBUTES = 10, 6


def test_facts_of_captions_by_hand() -> None:
    assert facts_of("A dog runs on the grass .", 3) == [Fact(3, "dog", "runs on", "grass")]
    assert facts_of("Two men with a hat riding a horse on the beach .") == [
        Fact(0, "man", "with", "hat"), Fact(0, "man", "riding", "horse"), Fact(0, "man", "on", "beach"),
    ]  # fmt: skip
    assert facts_of("A dog with a dog .") == [] and facts_of("Running !") == []
    assert Fact(0, "dog", "on", "sofa").condition == "on sofa"
    with pytest.raises(DataError, match="relates two things"):
        read_facts([Record("a", ImageRef(data=b""), ("nothing here",))])


def many_facts() -> list[Fact]:
    """`dog` in 12 images with three objects, `cat` in 6 with two, `owl` in too few, `cow` with a single object."""
    made = [Fact(image, "dog", "on", ("sofa", "grass", "beach")[image % 3]) for image in range(12)]
    made += [Fact(12 + image, "cat", "near", ("sofa", "tree")[image % 2]) for image in range(6)]
    made += [Fact(18 + image, "owl", "in", ("tree", "box")[image % 2]) for image in range(4)]
    return made + [Fact(22 + image, "cow", "on", "grass") for image in range(9)]


def test_triplets_follow_the_rules() -> None:
    facts = many_facts()
    of_image = {fact.image: fact for fact in facts}
    mined = mine_triplets(facts, 900, seed=1)
    subjects: Counter[str] = Counter()
    for reference, target, distractor, condition in zip(
        mined.reference.tolist(),
        mined.target.tolist(),
        mined.distractor.tolist(),
        mined.condition.tolist(),
        strict=True,
    ):
        one, other = of_image[reference], of_image[target]
        assert one.subject == other.subject and one.object != other.object and reference != target
        assert mined.conditions[condition] == other.condition
        assert of_image[distractor].object == other.object
        subjects[one.subject] += 1
    assert set(subjects) == {"dog", "cat"}
    assert subjects["dog"] / subjects["cat"] == pytest.approx(2, rel=0.25)  # in proportion to their images
    assert torch.equal(mine_triplets(facts, 900, seed=1).target, mined.target)
    left = mined.among([row if row != 0 else -1 for row in range(31)])
    assert 0 < len(left) < len(mined) and 0 not in left.reference and 0 not in left.target


def test_only_what_is_concrete_is_kept(tmp_path: Path) -> None:
    (tmp_path / "words.tsv").write_text("Word\tBigram\tConc.M\tConc.SD\n" + "\n".join(
        f"{word}\t0\t{score}\t0" for word, score in
        {"dog": 4.9, "cat": 4.9, "sofa": 4.9, "grass": 4.9, "beach": 2.0, "tree": 4.9}.items()))  # fmt: skip
    scores = read_concreteness(tmp_path / "words.tsv")
    mined = mine_triplets(many_facts(), 200, scores)
    assert "on beach" not in mined.conditions and {"on sofa", "on grass"} <= set(mined.conditions)
    with pytest.raises(DataError, match=r"no triplet of concreteness above 4\.95"):
        mine_triplets(many_facts(), 1, scores, threshold=4.95)
    with pytest.raises(DataError, match="None of 4 subjects is seen in 50 images"):
        mine_triplets(many_facts(), 1, min_images=50)
    with pytest.raises(ConfigError, match="0 triplets"):
        mine_triplets(many_facts(), 0)
    (tmp_path / "words.tsv").write_text("dog four\n")
    with pytest.raises(DataError, match=r"line 1: expected `word<TAB>score`"):
        read_concreteness(tmp_path / "words.tsv")


def test_the_formula_by_hand() -> None:
    torch.manual_seed(0)
    combiner = Combiner(3, CombinerSettings()).double().eval()
    weights = dict(combiner.state_dict())
    assert weights["text.0.weight"].shape == (12, 3) and weights["joined.0.weight"].shape == (24, 24)
    image, text = (F.normalize(torch.randn(4, 3, dtype=torch.float64), dim=1) for _ in range(2))
    for row in range(4):
        t = torch.relu(weights["text.0.weight"] @ text[row] + weights["text.0.bias"])
        x = torch.relu(weights["image.0.weight"] @ image[row] + weights["image.0.bias"])
        c = torch.cat([t, x])
        hidden = torch.relu(weights["joined.0.weight"] @ c + weights["joined.0.bias"])
        gate = torch.relu(weights["gate.0.weight"] @ c + weights["gate.0.bias"])
        s = torch.sigmoid(weights["gate.3.weight"] @ gate + weights["gate.3.bias"])
        out = weights["output.weight"] @ hidden + weights["output.bias"] + s * text[row] + (1 - s) * image[row]
        assert torch.allclose(combiner.combine(image, text)[row], out / out.norm())
    last = combiner.gate[3]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        for parameter in (combiner.output.weight, combiner.output.bias, last.weight):
            parameter.zero_()
        for value, expected in ((40.0, text), (-40.0, image), (0.0, F.normalize(image + text, dim=1))):
            last.bias.fill_(value)
            assert torch.allclose(combiner.combine(image, text), expected)


def test_the_loss_leaves_out_the_own_target_under_another_row() -> None:
    query, gallery = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    # Scores 1, 0.6 / 0, 0.8: -log of e^1/(e^1 + e^0.6) and of e^0.8/(e^0 + e^0.8).
    assert combiner_loss(query, gallery, nothing, 1.0).item() == pytest.approx((0.513015 + 0.371101) / 2, abs=1e-5)
    other = torch.tensor([[False, True], [False, False]])
    assert combiner_loss(query, gallery, other, 1.0).item() == pytest.approx((0 + 0.371101) / 2, abs=1e-5)


def needs_a_combiner() -> tuple[torch.Tensor, torch.Tensor, Triplets]:
    """Images show a subject and an attribute; a condition names the attribute in a direction of its own.

    The mean of both still points to the reference's attribute, and no image lies in the condition's direction.
    """
    drawn = torch.Generator().manual_seed(0)
    dim = SUBJECTS + 2 * ATTRIBUTES
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=drawn)).Q
    subjects, attributes, words = basis.split([SUBJECTS, ATTRIBUTES, ATTRIBUTES])
    images = F.normalize((subjects[:, None] + attributes[None]).flatten(0, 1), dim=1)
    rows = [
        (s * ATTRIBUTES + a, s * ATTRIBUTES + b, (s + 1) % SUBJECTS * ATTRIBUTES + b, b)
        for s in range(SUBJECTS) for a in range(ATTRIBUTES) for b in range(ATTRIBUTES) if a != b
    ]  # fmt: skip
    reference, target, distractor, condition = torch.tensor(rows).T
    names = tuple(f"attribute {n}" for n in range(ATTRIBUTES))
    return images, words, Triplets(reference, target, distractor, condition, names)


@pytest.mark.parametrize("distractors", [False, True])
def test_training_finds_what_the_mean_cannot(distractors: bool) -> None:
    images, words, triplets = needs_a_combiner()
    settings = CombinerSettings(lr=3e-3, batch_size=64, epochs=12, distractors=distractors)
    untrained = Combiner(images.shape[1], settings)
    mean = F.normalize(images[triplets.reference] + words[triplets.condition], dim=1) @ images.T
    assert (mean.argmax(1) == triplets.target).double().mean() == 0
    assert held_out_recall(untrained, images, words, triplets) < 0.1
    # The held-out tenth are pairs of attributes of a subject that training has not seen.
    trained = train_combiner(images, words, triplets, settings)
    assert held_out_recall(trained, images, words, triplets) > 0.95
    again = train_combiner(images, words, triplets, settings)
    assert torch.equal(trained.output.weight, again.output.weight)


def test_a_combiner_is_for_its_model(tmp_path: Path) -> None:
    settings = CombinerSettings(projection=1, hidden=1)
    combiner = Combiner(4, settings)
    save_combiner(tmp_path / "c", combiner, settings, "a" * 64)
    image, text = torch.eye(4), torch.eye(4).flip(0)
    assert torch.equal(load_combiner(tmp_path / "c", "a" * 64).combine(image, text), combiner.combine(image, text))
    with pytest.raises(CheckpointError, match="features of another model"):
        load_combiner(tmp_path / "c", "b" * 64)
    (tmp_path / "c" / "combiner.safetensors").write_bytes(b"cut")
    for place in ("c", "nowhere"):
        with pytest.raises(CheckpointError, match="holds no combiner that can be read"):
            load_combiner(tmp_path / place, "a" * 64)
    with pytest.raises(ConfigError, match="held_out"):
        CombinerSettings(held_out=1.0)


def test_command_trains_and_loads(
    vlkit_data: Path, general_encoder: Path, tmp_path: Path, call_vlkit: Callable[..., Any]
) -> None:
    command = ["eval", "conditional-retrieval", "--model", f"local-dir:{general_encoder}", "--data",
               vlkit_data / "coco_small", "--form", "objects", "--num-distractors", 6, "--out", tmp_path / "r.jsonl",
               "--combiner", tmp_path / "head", "--json"]  # fmt: skip
    lines = (vlkit_data / "flickr8k_aspect" / "captions.txt").read_text().splitlines()[: 1 + 5 * 60]
    place = vlkit_data / "flickr8k_aspect" / "images"
    (tmp_path / "captions.csv").write_text("\n".join([lines[0], *(f"{place}/{line}" for line in lines[1:])]))
    trained = call_vlkit(*command, "--captions", tmp_path / "captions.csv", "--num-triplets", 300, "--epochs", 1)
    assert trained.code == 0, trained.err
    assert "300 triplets from" in trained.err
    metrics = json.loads(trained.out)["metrics"]
    assert {"recall@1", "combiner/recall@1", "combiner/focus_object/recall@3", "combiner/tasks/recall@1"} <= set(
        metrics
    )
    loaded = call_vlkit(*command)
    assert loaded.code == 0, loaded.err
    assert json.loads(loaded.out)["metrics"] == metrics
    nowhere = call_vlkit(*command[:-3], "--captions", tmp_path / "captions.csv")
    assert nowhere.code == 1 and "--combiner FOLDER" in nowhere.err
