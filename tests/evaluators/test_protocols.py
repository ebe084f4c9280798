"""Protocols: what they fix, what they refuse, and the numbers they are compared with."""

import dataclasses
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.folds import FoldedRetrieval
from eval.multi_label import MultiLabelEvaluator
from eval.protocol_data import find_data, prepare, wds_protocols
from eval.protocols import PROTOCOLS, TEMPLATES, Protocol, find_protocol
from eval.published import compare_with_published
from vlkit.addons.class_weights.templates import check_templates
from vlkit.errors import ConfigError, DataError
from vlkit.models import catalogue
from vlkit.models.zero_shot_text import imagenet_class_names


def class_folders(root: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for copy in range(2):
            colour = tuple(
                int(torch.randint(0, 255, (), generator=torch.Generator().manual_seed(number))) for _ in "rgb"
            )
            Image.new("RGB", (20 + copy, 20), colour).save(root / name / f"{copy}.png")
    return root


def test_every_row_is_whole() -> None:
    named = {"coco5k-karpathy", "coco1k-folds", "flickr1k", "flickr8k-test", "imagenet-80", "cifar10-18", "caltech101"}
    assert named <= set(PROTOCOLS)
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name and protocol.folders and protocol.metric
        check_templates(protocol.prompts(), name)
        assert len(protocol.settings("fp32", "reference")["fingerprint"]) == 12
    assert len(TEMPLATES["cifar18"]()) == 18 and len(TEMPLATES["caltech34"]()) == 34
    assert {"a blurry photo of the {}.", "a photo of a big {}."} <= set(TEMPLATES["cifar18"]())
    assert {"a plastic {}.", "the toy {}.", "art of the {}.", "the {} in a video game."} <= set(
        TEMPLATES["caltech34"]()
    )


def test_the_fingerprint_moves_with_every_choice_and_with_nothing_else() -> None:
    protocol = PROTOCOLS["caltech101"]
    own = protocol.settings("fp32", "reference")["fingerprint"]
    assert own == protocol.settings("fp32", "reference")["fingerprint"]
    others = [protocol.settings("bf16", "reference"), protocol.settings("fp32", "fast")]
    for change in ({"templates": "photo"}, {"excluded": ()}, {"half": "base"}, {"split": "test"}, {"renamed": ()}):
        others.append(dataclasses.replace(protocol, **change).settings("fp32", "reference"))
    names = ("coco5k-karpathy", "coco1k-folds", "coco5k-karpathy-first5")
    others += [PROTOCOLS[name].settings("fp32", "reference") for name in names]
    found = {other["fingerprint"] for other in others}
    assert len(found) == len(others) and own not in found


def test_an_unknown_protocol_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"flickr8k-test"):
        find_protocol("flickr8ktest")


def test_published_numbers_are_those_of_weights_that_exist() -> None:
    from eval.published import _PUBLISHED

    for name, protocols in _PUBLISHED.items():
        architecture, _, tag = name.partition("/")
        assert tag in catalogue.pretrained_tags(architecture), name
        assert set(protocols) <= set(PROTOCOLS)
    value = compare_with_published("open_clip:ViT-B-32/openai@w.pt", "flickr1k", {"text_to_image/recall@1": 0.5905})
    assert value["text_to_image/recall@1"].published == 0.588  # reference table: Flickr t->i R@1
    assert value["text_to_image/recall@1"].within is False
    near = compare_with_published("open_clip:ViT-B-32/openai", "imagenet-80", {"accuracy@1": 0.6313})
    assert near["accuracy@1"].within and near["accuracy@1"].difference == pytest.approx(-0.0019)
    assert not compare_with_published("run:ViT-B-32/openai", "flickr1k", {"text_to_image/recall@1": 0.5})
    assert not compare_with_published("open_clip:ViT-B-32/openai", "flickr8k-test", {"mean_recall@1": 0.5})


def test_caltech_drops_faces_easy_and_renames_four_classes(tmp_path: Path) -> None:
    names = ["Faces", "Faces_easy", "Leopards", "Motorbikes", "airplanes", "sea_horse"]
    protocol = dataclasses.replace(PROTOCOLS["caltech101"], num_classes=5)
    prepared = prepare(protocol, class_folders(tmp_path / "caltech101", names))
    evaluator = prepared.evaluator
    assert tuple(evaluator.class_names) == ("face", "leopard", "motorbike", "airplane", "sea horse")  # type: ignore[union-attr]
    keys = {(record.key.split("/")[0], record.label) for record in evaluator.records}
    assert keys == {("Faces", 0), ("Leopards", 1), ("Motorbikes", 2), ("airplanes", 3), ("sea_horse", 4)}


def test_base_and_new_classes_are_halves_of_which_each_is_judged_alone(tmp_path: Path) -> None:
    names = ["ant", "bee", "cat", "dog", "elk"]
    place = class_folders(tmp_path / "caltech101", names)
    seen = []
    for half in ("base", "new"):
        protocol = dataclasses.replace(PROTOCOLS[f"caltech101-{half}"], num_classes=5, excluded=())
        evaluator = prepare(protocol, place).evaluator
        seen.append(tuple(evaluator.class_names))  # type: ignore[union-attr]
        assert {record.label for record in evaluator.records} == set(range(len(seen[-1])))
    assert seen == [("ant", "bee", "cat"), ("dog", "elk")]  # CoOp: the larger half is base


def test_imagenet_names_follow_the_sorted_folders_and_may_repeat(tmp_path: Path) -> None:
    place = class_folders(tmp_path / "imagenet", [])
    for number in range(1000):
        (place / f"n{number:08d}").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(place / f"n{number:08d}" / "0.png")
    protocol = dataclasses.replace(PROTOCOLS["imagenet-80"], num_images=1000)
    evaluator = prepare(protocol, place).evaluator
    assert tuple(evaluator.class_names) == imagenet_class_names()  # type: ignore[union-attr]
    assert [record.label for record in evaluator.records] == list(range(1000))


def test_other_data_than_the_protocols_are_refused(tmp_path: Path) -> None:
    place = class_folders(tmp_path / "cifar10", ["ant", "bee"])
    with pytest.raises(DataError, match=r"has 2 classes .* has 10"):
        prepare(PROTOCOLS["cifar10-18"], place)
    (tmp_path / "f8k").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "f8k" / "a.png")
    (tmp_path / "f8k" / "table.csv").write_text("image,caption,split\na.png,a dog,test\n")
    with pytest.raises(DataError, match=r"gives 1 images of split test; protocol flickr8k-test has 1000"):
        prepare(PROTOCOLS["flickr8k-test"], tmp_path / "f8k" / "table.csv")
    with pytest.raises(DataError, match=r"holds none of flickr8k, Flickr8k"):
        find_data(PROTOCOLS["flickr8k-test"], tmp_path / "f8k")
    assert find_data(PROTOCOLS["cifar10-18"], tmp_path) == place
    assert find_data(PROTOCOLS["cifar10-18"], place) == place


def test_folds_are_equal_and_the_first_captions_are_taken(tmp_path: Path) -> None:
    rows = ["image,caption"]
    for number in range(6):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        rows += [f"{number}.png,caption {number} {copy}" for copy in range(3)]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    protocol = Protocol("p", "p", "retrieval", (), "mean_recall@1", captions=2, folds=3)
    prepared = prepare(protocol, tmp_path / "t.csv")
    assert isinstance(prepared.evaluator, FoldedRetrieval) and prepared.evaluator.folds == 3
    assert {len(record.captions) for record in prepared.evaluator.records} == {2}
    with pytest.raises(DataError, match="4 equal folds; expected a divisor"):
        prepare(dataclasses.replace(protocol, folds=4), tmp_path / "t.csv")


def test_the_wds_layout_makes_protocols_of_its_own(tmp_path: Path) -> None:
    several = {0: [1, 0, 0], 1: [1, 0, 1], 2: [0, 0, 0]}
    for name, kind in (("vtab-x", None), ("pairs", "retrieval"), ("voc", "multilabel")):
        folder = tmp_path / name
        (folder / "test").mkdir(parents=True)
        with tarfile.open(folder / "test" / "0.tar", "w") as tar:
            for number in range(3):
                Image.new("RGB", (8, 8), (number, 9, 9)).save(tmp_path / "i.png")
                (tmp_path / "label").write_text(f"caption {number}" if kind else str(number % 2))
                tar.add(tmp_path / "i.png", f"s{number:07d}.png")
                if kind == "multilabel":
                    with (tmp_path / "label").open("wb") as file:
                        np.save(file, np.array(several[number]))
                suffix = {None: "cls", "retrieval": "txt", "multilabel": "npy"}[kind]
                tar.add(tmp_path / "label", f"s{number:07d}.{suffix}")
        if kind:
            (folder / "dataset_type.txt").write_text(kind)
        if kind != "retrieval":
            (folder / "classnames.txt").write_text("ant_hill\nbee" + ("\ncat" if kind else ""))
            (folder / "zeroshot_classification_templates.txt").write_text("a {c}.\nthe {c}.")
    found = wds_protocols(tmp_path)
    assert [(p.name, p.task) for p, _ in found.values()] == [
        ("wds/pairs", "retrieval"),
        ("wds/voc", "multi-label"),
        ("wds/vtab-x", "classification"),
    ]
    voc = prepare(*found["voc"])
    assert isinstance(voc.evaluator, MultiLabelEvaluator) and voc.protocol.metric == "mean_average_precision"
    assert [record.labels for record in voc.evaluator.records] == [(0,), (0, 2), ()]
    (tmp_path / "voc" / "dataset_type.txt").write_text("boxes")
    with pytest.raises(DataError, match="says 'boxes'; expected classification, multilabel or retrieval"):
        wds_protocols(tmp_path)
    (tmp_path / "voc" / "dataset_type.txt").write_text("multilabel")
    evaluator = prepare(*found["vtab-x"]).evaluator
    assert tuple(evaluator.class_names) == ("ant_hill", "bee")  # type: ignore[union-attr]
    assert tuple(evaluator.templates) == ("a {}.", "the {}.")  # type: ignore[union-attr]
    with pytest.raises(DataError, match="No data set in CLIP_benchmark's wds layout"):
        wds_protocols(tmp_path / "pairs")


def test_real_flickr8k_and_caltech_are_what_the_protocols_demand(vlkit_data: Path) -> None:
    flickr = prepare(PROTOCOLS["flickr8k-test"], find_data(PROTOCOLS["flickr8k-test"], vlkit_data))
    assert sum(len(record.captions) for record in flickr.evaluator.records) == 5000
    caltech = prepare(PROTOCOLS["caltech101"], find_data(PROTOCOLS["caltech101"], vlkit_data))
    assert len(caltech.evaluator.class_names) == 100  # type: ignore[union-attr]
