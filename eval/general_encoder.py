"""The small general encoder that every method is measured on: its data, its training, its figures, its card.

    make_general_encoder(data, cache_folder() / "general_small", out)

`make encoder` calls this. A training that was interrupted continues; one that is done with these settings is only
measured and copied.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from data_tools.general_sets import build_general_sets
from eval.class_names import name_classes
from eval.classification import ClassificationEvaluator
from eval.retrieval import RetrievalEvaluator
from vlkit.config import RunConfig, load_run
from vlkit.contracts import Evaluation, Progress
from vlkit.data.sources import read_source
from vlkit.errors import DataError
from vlkit.features.source import FeatureSource, open_source
from vlkit.models.load import load_encoder
from vlkit.models.saved import save_encoder
from vlkit.models.tokenizers import get_tokenizer
from vlkit.training.loop import Every
from vlkit.training.pretrain import pretrain

TOKENIZER = "open_clip:clip_bpe"
SETS = ("flickr8k_again", "flickr8k", "tiny_imagenet", "noto_emoji")
MAX_BYTES = 16 * 2**20
# Caltech's names of categories that are no words of everyday English, as CoOp's class list has them.
CALTECH_NAMES = {"Faces": "face", "airplanes": "airplane", "Leopards": "leopard", "Motorbikes": "motorbike"}
WEIGHTS = "open_clip_model.safetensors"
FIGURES = "figures.json"

# Opens a progress bar: what happens -> context manager that gives a Progress.
Bars = Callable[[str], AbstractContextManager[Progress | None]]


def make_general_encoder(
    data: Path,
    work: Path,
    out: Path,
    *,
    every: tuple[Every, ...] = (),
    bars: Bars = lambda label: nullcontext(None),
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, dict[str, list[float]]]:
    """Build the shards, train, measure, and write the folder; what is there already is not made again.

    Args:
        data: folder of the real data sets.
        work: holds shards and the run; kept, so that a second call finds them.
        out: gets the encoder as a `local-dir:` folder in bf16, with README.md and figures.json.
        every: further entries of the training loop.
        bars: opens a progress bar for a stage.
        say: takes what a user should know.

    Returns:
        The figures: data set -> metric -> value, low, high of the 95% interval.

    Raises:
        DataError: a data set is missing, or the weights exceed 16 MiB.
    """
    run_folder = folder_of(load_run("general_small"), work)
    if not (run_folder / "model").is_dir():
        with bars("shards") as tick:
            tokenizers = {TOKENIZER: get_tokenizer(TOKENIZER).encode_ragged}
            build_general_sets(data, work / "shards", tokenizers=tokenizers, progress=tick)
        shards = json.dumps([str(work / "shards" / name) for name in SETS])
        overrides = [f"run.out={run_folder}", f"data.train={shards}", f"data.val={work / 'shards' / 'flickr8k_dev'}"]
        with bars("train") as tick:
            pretrain(load_run("general_small", overrides), every=every, resume=True, progress=tick, say=say)
    else:
        say(f"found trained in {run_folder}; only measured and copied")
    copy_encoder(run_folder, out)
    figures = measure_encoder(f"local-dir:{out}", data, bars)
    (out / FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(model_card(figures, weights_size(out)), encoding="utf-8")
    return figures


def folder_of(run: RunConfig, work: Path) -> Path:
    """Where a run is kept: under a name of its settings, so that one of other settings is not taken for it."""
    return work / f"run-{hashlib.sha256(run.model_dump_json().encode()).hexdigest()[:12]}"


def copy_encoder(run: Path, out: Path) -> None:
    """A run's encoder as a model folder with weights in bf16.

    Raises:
        DataError: the weights exceed 16 MiB.
    """
    encoder = load_encoder(f"run:{run}")
    weights = {name: tensor.detach().to(torch.bfloat16) for name, tensor in encoder.weights().items()}
    save_encoder(encoder, out, weights)
    if weights_size(out) > MAX_BYTES:
        raise DataError(f"The weights have {weights_size(out)} bytes; expected at most {MAX_BYTES}.")


def weights_size(folder: Path) -> int:
    """Bytes of the weights."""
    return os.path.getsize(folder / WEIGHTS)


def measure_encoder(
    name: str, data: Path, bars: Bars = lambda label: nullcontext(None)
) -> dict[str, dict[str, list[float]]]:
    """Its figures on the data sets that are kept for measuring.

    Args:
        name: of the model.
        data: folder of the real data sets.
        bars: opens a progress bar for each of them.
    """
    source = open_source(name, "cpu")
    figures: dict[str, dict[str, list[float]]] = {}
    for split in ("dev", "test"):
        with bars(f"flickr8k {split}") as tick:
            records = read_source(data / "flickr8k", format="flickr8k", split=split).records
            found = RetrievalEvaluator(records, progress=tick).run(source)
        figures[f"flickr8k {split}"] = _figures(found, ("text_to_image/recall@10", "image_to_text/recall@10"))
    for folder, exclude in (("caltech101", ("Faces_easy",)), ("cifar10_test", ())):
        with bars(folder) as tick:
            figures[folder] = _classified(data / folder, exclude, source, tick)
    return figures


def model_card(figures: Mapping[str, Mapping[str, list[float]]], size: int) -> str:
    """README.md of the folder."""
    rows = [
        f"| {data} | {metric} | {value[0]:.1%} | {value[1]:.1%} to {value[2]:.1%} |"
        for data, metrics in figures.items()
        for metric, value in metrics.items()
    ]
    return _CARD.format(rows="\n".join(rows), size=size / 2**20, samples=load_run("general_small").run.samples)


def _classified(
    folder: Path, exclude: tuple[str, ...], source: FeatureSource, progress: Progress | None
) -> dict[str, list[float]]:
    found = read_source(folder, format="folder")
    classes = name_classes(found.class_names, found.records, exclude=exclude)
    names = [CALTECH_NAMES.get(name, name) for name in classes.names]
    return _figures(ClassificationEvaluator(classes.records, names, progress=progress).run(source), ("accuracy@1",))


def _figures(evaluation: Evaluation, metrics: tuple[str, ...]) -> dict[str, list[float]]:
    return {
        key: [round(evaluation.metrics[key], 4), *(round(b, 4) for b in evaluation.intervals[key])] for key in metrics
    }


_CARD = """\
# general_small: the encoder that vlkit's methods are measured on

A small CLIP with a ViT (6 layers, width 192, 64 patches of 8 x 8 pixels; patch features lie in the joint space) and a
causal text tower with CLIP's tokenizer. It is good enough to tell methods apart, and for nothing else.

- Made by `make encoder`: the run file `general_small` (seed 0, {samples:,} images, one CPU core, Muon), weights
  rounded to bfloat16 ({size:.1f} MiB).
- Data: the 6,000 training photographs of Flickr8k with their captions (each twice an epoch), 8,000 photographs of Tiny
  ImageNet with captions through templates of the class name and of its everyday kind, 1,903 Noto emoji with names and
  keywords. No picture is part of this folder.
- Learning rates and batch were chosen by the loss and on Flickr8k's dev split in short trainings, masking on the dev
  split after whole ones. Names of everyday kinds (dog, bird, truck, ...) were written down for the classes of Tiny
  ImageNet; some are classes of CIFAR-10 and Caltech-101 too, no picture of which was used.
- Load it as `local-dir:tests/data/encoder`.

| data | metric | value | 95% interval |
|---|---|---|---|
{rows}

Caltech-101 is without `Faces_easy` (100 classes), CIFAR-10 is 200 test images of each class; templates `simple`.
"""
