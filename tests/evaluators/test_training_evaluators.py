"""Every evaluator as a [[eval]] section: the numbers it gives outside training, and mistakes are refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from eval.in_training import make_every
from eval.methods import METHODS
from eval.training_evaluators import EVALUATORS, build_evaluator
from vlkit.config import EvalSettings, EvaluatorName, load_run
from vlkit.errors import ConfigError, DataError
from vlkit.features.source import CachedEmbedder
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.embedder import Embedder
from vlkit.models.open_clip_encoder import build_encoder
from vlkit.models.saved import save_encoder
from vlkit.training.loop import Moment

ARCHITECTURE = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
CLASSES = ("ball", "cat", "dog", "tree")


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    torch.manual_seed(0)
    return build_encoder(ARCHITECTURE).eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders, captions and groups of the same pictures, objects in COCO's form, pairs in MMVP's."""
    root = tmp_path_factory.mktemp("data")
    drawn = np.random.default_rng(0)
    table, groups, scored = ["image,caption"], ["file,group"], ["sentence1,sentence2,score"]
    reasons = ["image,class,caption"]
    for number in range(24):
        name = CLASSES[number % 4]
        path = root / "photos" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((24, 20)).save(path)
        table += [f"{path.relative_to(root)},a {name} near the {CLASSES[number % 3]} {copy}" for copy in "ab"]
        groups.append(f"{name}/{number}.png,{'light' if number % 3 else 'dark'}")
        scored.append(f"a {name},the {CLASSES[number % 3]},{number % 5}")
        reasons.append(f"{path.relative_to(root)},{name},{'its fur' if number % 3 else 'its colour'}")
    for file, lines in (("table.csv", table), ("groups.csv", groups), ("sts.csv", scored), ("reasons.csv", reasons)):
        (root / file).write_text("\n".join(lines))
    write_judgements(root / "flickr8k", drawn)
    (root / "again").symlink_to(root / "photos")
    write_objects(root / "coco", drawn)
    torch.manual_seed(1)
    save_encoder(build_encoder(ARCHITECTURE), root / "second")
    (root / "mmvp" / "MLLM_VLM Images" / "Orientation").mkdir(parents=True)
    rows = ["Question ID,Type,Statement"]
    for number in (1, 2):
        Image.fromarray(drawn.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
            root / "mmvp" / "MLLM_VLM Images" / "Orientation" / f"{number}.jpg"
        )
        rows.append(f"{number},Orientation,a thing {number}")
    (root / "mmvp" / "Questions.csv").write_text("\n".join(rows))
    return root


def write_objects(folder: Path, drawn: np.random.Generator) -> None:
    """Twelve photographs, each with two of four categories in boxes of their own."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    images: list[dict[str, Any]] = []
    things: list[dict[str, Any]] = []
    for number in range(12):
        name = f"{number:012d}.jpg"
        Image.fromarray(drawn.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(folder / "val2017" / name)
        images.append({"id": number, "file_name": name, "height": 32, "width": 48})
        for place, category in enumerate({number % 4, (number // 2) % 4}):
            left = 24 * place
            shape = [[left, 0, left + 20, 0, left + 20, 28, left, 28]]
            things.append({"id": len(things), "image_id": number, "category_id": category, "bbox": [left, 0, 20, 28],
                           "area": 560, "iscrowd": 0, "segmentation": shape})  # fmt: skip
    categories = [{"id": n, "name": name} for n, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": things, "categories": categories}
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))


def write_judgements(folder: Path, drawn: np.random.Generator) -> None:
    """Three images in Flickr8k's files, and what people thought of captions."""
    (folder / "Images").mkdir(parents=True)
    tokens, expert = [], []
    for number, name in enumerate(CLASSES[:3]):
        Image.fromarray(drawn.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "Images" / f"{number}.jpg")
        tokens += [f"{number}.jpg#{place}\ta {name} {word} ." for place, word in enumerate(("runs", "sits"))]
        expert += [f"{number}.jpg\t{(number + 1) % 3}.jpg#{place}\t{1 + place}\t{number + 1}\t2" for place in (0, 1)]
    (folder / "Flickr8k.token.txt").write_text("\n".join(tokens))
    (folder / "ExpertAnnotations.txt").write_text("\n".join(expert))


def run_with(*sections: dict[str, Any]) -> Any:
    run = {"run": {"out": "out", "steps": 1}, "model": {"name": "ViT-B-32"}, "data": {"train": "train"}}
    return load_run({**run, "eval": list(sections)})


def moment(encoder: DualEncoder) -> Moment:
    numbers: dict[str, Any] = {field.name: 1 for field in dataclasses.fields(Moment)}
    return Moment(**{**numbers, "parts": {}, "watched": {}, "metrics": {}, "stopping": False, "encoder": encoder})


SECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "retrieval": ("table.csv", {"text_prefix": "A photo depicts "}),
    "classification": ("photos", {"templates": "photo", "exclude": ["tree"]}),
    "probe": ("photos", {}),
    "few-shot": ("photos", {"shots": [1], "seeds": [1]}),
    "knn": ("photos", {"k": [1, 3], "temperature": 1}),
    "base-to-new": ("photos", {"shots": 1}),
    "cross-dataset": ("photos", {"targets": ["{root}/again"], "shots": 1}),
    "ood": ("photos", {"near": ["{root}/coco/val2017"]}),
    "image-retrieval": ("photos", {}),
    "worst-group": ("photos", {"groups": "{root}/groups.csv"}),
    "caption-judgement": ("flickr8k", {}),
    "image-caption-choice": ("table.csv", {"form": "swapped"}),
    "text-similarity": ("sts.csv", {"scored": True}),
    "segmentation": ("coco", {"templates": "photo"}),
    "referring": ("coco", {"views": ["crop", "circle"]}),
    "pointing": ("coco", {"method": "patches"}),
    "explanation": ("coco", {"method": "patches"}),
    "composed-retrieval": ("coco", {"form": "objects"}),
    "conditional-retrieval": ("coco", {"form": "objects", "num_distractors": 2}),
    "blind-pairs": ("mmvp", {}),
    "mine-pairs": ("table.csv", {"second": "local-dir:{root}/second", "share": 0.1}),
    "doubly-right": ("reasons.csv", {"k": 3}),
    "vocabulary-free": ("photos", {"captions": "{root}/table.csv"}),
    "cluster-and-name": (
        "photos", {"clusters": [2], "captions": "{root}/table.csv", "hidden": 8, "dim": 4, "epochs": 1}
    ),
}  # fmt: skip


def section_of(name: str, root: Path) -> dict[str, Any]:
    data, options = SECTIONS[name]
    filled = json.loads(json.dumps(options).replace("{root}", str(root)))
    return {"name": name, "data": str(root / data), "options": filled, "every": "3 steps"}


def test_all_evaluators_have_a_name_in_the_run_file() -> None:
    assert set(get_args(EvaluatorName)) == set(EVALUATORS) == set(SECTIONS)
    modules = {name.replace("_", "-") for name in METHODS}
    # Options of others, or under another name.
    apart = {"mined-pairs", "combiner", "folds", "mask-refinement", "grounding", "multi-label"}
    assert modules - set(EVALUATORS) <= apart


def test_each_gives_the_numbers_it_gives_outside(root: Path, encoder: DualEncoder) -> None:
    sections = [section_of(name, root) for name in SECTIONS]
    entries = make_every(run_with(*sections))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    written = [dict(entry.action(moment(encoder)) or {}) for entry in entries]
    assert torch.equal(torch.random.get_rng_state(), before)  # the training's own numbers go on as without
    keys: list[str] = []
    for section, found in zip(sections, written, strict=True):
        if section["name"] in ("few-shot", "cluster-and-name"):  # seconds each
            assert found and all(key.startswith(section["name"]) for key in found)
            continue
        source = CachedEmbedder(lambda: Embedder(encoder, "same"), None)
        expected = build_evaluator(EvalSettings.model_validate_json(json.dumps(section))).run(source).metrics
        name = section["name"]
        prefix = "" if name in ("retrieval", "classification") else f"{name}/"
        # CLIPScore cuts negative cosines at 0, and an untrained encoder may have no others.
        assert found or name == "caption-judgement"
        assert set(found) <= {prefix + key for key in expected}, name
        for key, value in found.items():
            assert value == pytest.approx(expected[key.removeprefix(prefix)], abs=1e-5), key
        keys += found
    assert len(keys) == len(set(keys))


def test_columns_and_refinement_are_what_the_commands_take(root: Path) -> None:
    """Two columns of captions and two of classes: the one that is named is read."""
    (root / "columns.csv").write_text(
        "file,short,long,kind,group\n"
        + "\n".join(f"photos/{CLASSES[n]}/{n}.png,a {n},a long {n},{CLASSES[n]},{'ab'[n % 2]}" for n in range(4))
    )

    def built(name: str, data: str, **options: Any) -> Any:
        section = {"name": name, "data": str(root / data), "options": options, "every": "1 steps"}
        return build_evaluator(EvalSettings.model_validate_json(json.dumps(section)))

    captions = built("retrieval", "columns.csv", image_column="file", caption_column="long")
    assert [record.captions for record in captions.evaluator.records] == [(f"a long {n}",) for n in range(4)]
    classes = built("classification", "columns.csv", image_column="file", class_column="group")
    assert list(classes.class_names) == ["a", "b"]
    with pytest.raises(ConfigError, match=r"\[\[eval\]\] name = 'classification': --class-column has no effect"):
        built("classification", "photos", class_column="group")
    masks = built("segmentation", "coco", refine=3, refine_dilations=[1, 2], denoise=0.1)
    assert (masks.refine_steps, masks.refine_dilations, masks.denoise) == (3, (1, 2), 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"kk": [1]}}, "'kk' is no option of it. Did you mean k?"),
        ({"options": {"k": "1"}}, "options k: "),
        ({"options": {"k": [0.5]}}, "options k.0: "),
        ({"options": {"format": "folder"}}, "'format' is no option of it"),
        ({"split": "test"}, "'split' is no option of it"),
        ({"name": "ood", "options": {"temperature": True}}, "options temperature: "),
        ({"name": "worst-group"}, "options groups: Missing required keyword only argument"),
        ({"name": "image-caption-choice", "options": {"form": "sugarcrepe"}, "split": "test"}, "split has no effect"),
        ({"name": "classification", "options": {"templates": "photos"}}, "photos"),
        ({"name": "blind-pairs", "images": "x"}, "'images' is no option of it"),
    ],
)
def test_a_mistaken_section_is_refused_before_training(change: dict[str, Any], message: str, root: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        make_every(run_with({**section_of("knn", root), **({"options": {}} if "name" in change else {}), **change}))
    assert message in str(raised.value)


def test_equal_sections_and_missing_data_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"Two \[\[eval\]\] sections would both write photos/knn/"):
        make_every(run_with(section_of("knn", root), section_of("knn", root)))
    for name in ("segmentation", "blind-pairs", "vocabulary-free"):
        with pytest.raises(DataError):
            make_every(run_with({**section_of(name, root), "data": str(root / "nowhere")}))
    with pytest.raises(ConfigError, match="takes no options"):
        run_with({"protocol": "cifar10-18", "data": "x", "options": {"k": 1}})
