"""What needs something made first: WiSE-FT a fine-tuned model, head ablation a cue that misleads, TextSpan its spans.

    python tests/benchmarks/addons_trained.py wise_ft --data $VLKIT_DATA > wise_ft.jsonl
    python tests/benchmarks/addons_trained.py head_ablation --data $VLKIT_DATA > head_ablation.jsonl
    python tests/benchmarks/addons_trained.py text_span --data $VLKIT_DATA > text_span.jsonl
    python tests/benchmarks/addons_measured.py collect *.jsonl

wise_ft: FLYP (the run file `flyp`, smaller: batch 64, rate 1e-4, 10 epochs) on 16 images of each class of Caltech-101;
the share of the fine-tuned weights is chosen on validation images, and measured on the others and on CIFAR-10; beside
it one half, which the paper takes where nothing is chosen.
head_ablation: CIFAR-10's airplanes, ships, deer and horses on a blue or a green ground, half of each class on each; the
worst of the eight groups, with the heads of the last four layers whose texts (TextSpan, on the half of the images that
is not tested on, without labels) speak of such grounds. Nothing is chosen on test images.
text_span: CIFAR-10, where each head of the last four layers writes only what lies in the span of 10 of 1,000 captions
of Flickr8k's training images (everything else of the feature stays); beside the whole feature, and beside the span of
as many of these captions drawn at random. The spans are found on the same images, without labels, as in the paper.
"""

import argparse
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data_tools.build import build_shards
from eval.addons import classification_bench
from eval.class_names import name_classes
from eval.classification import ClassificationEvaluator
from eval.general_encoder import CALTECH_NAMES
from eval.metrics import paired_difference
from vlkit.addons.class_names import parse_class
from vlkit.addons.class_weights.templates import load_templates, template_weights
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.reference import Part, Reference
from vlkit.addons.registry import make_addon
from vlkit.config import load_run
from vlkit.data.images import read_image
from vlkit.data.records import ImageRef, Record
from vlkit.data.sources import read_source
from vlkit.features.cache import FeatureCache
from vlkit.features.source import FeatureSource, open_source
from vlkit.interpret.decomposition import Decomposition, decompose
from vlkit.interpret.text_span import text_span
from vlkit.models.tokenizers import get_tokenizer
from vlkit.training.pretrain import pretrain

ENCODER = Path(__file__).parents[1] / "data" / "encoder"
TOKENIZER = "open_clip:clip_bpe"
ALPHAS, PAPERS = (0.25, 0.5, 0.75, 1.0), 0.5
CUES = {"blue": (70, 130, 200), "green": (70, 140, 60)}
THINGS = ("airplane", "ship", "deer", "horse")
ABOUT = "sky|water|sea|grass|field|forest|blue|green"
POOL = (
    "a blue sky", "deep water", "the sea", "green grass", "a field", "a forest", "something blue", "something green",
    "a wing", "four legs", "a pointed shape", "antlers", "an animal", "a vehicle", "metal", "fur", "a close view",
    "a distant view", "a dark picture", "a bright picture", "something round", "something long", "two things", "a face",
)  # fmt: skip
NUM_CAPTIONS, NUM_SPANNING = 1000, 10
_RESAMPLES = 1000


def wise_ft(source: FeatureSource, data: Path, model: str) -> Iterator[dict[str, Any]]:
    found = read_source(str(data / "caltech101"))
    classes = name_classes(found.class_names, found.records, exclude=["Faces_easy"])
    names = [CALTECH_NAMES.get(name, name) for name in classes.names]
    passes = Passes(source, workers=1)
    bench, _ = classification_bench(passes, classes.records, names, shots=16, seed=1)
    few, val = bench.reference.few_shot, bench.reference.val
    assert few is not None and val is not None and val.labels is not None
    with tempfile.TemporaryDirectory() as folder:
        tuned = fine_tuned(model, replace(found, records=few.records, class_names=tuple(names)), Path(folder))
        pipelines = {alpha: mixed(tuned, alpha, source) for alpha in ALPHAS}
        right = {}
        for alpha, pipeline in pipelines.items():
            classifier = pipeline.classifier(bench.reference.class_names, source, "simple")
            logits = classifier.logits(passes.read(val.records, pipeline.edits).vectors)
            right[alpha] = bench.reference.metric(logits, val.labels)
        chosen = max(ALPHAS, key=lambda alpha: right[alpha])
        other = read_source(str(data / "cifar10_test"))
        for alpha in dict.fromkeys((chosen, PAPERS)):
            pipeline, settings = pipelines[alpha], f"alpha {alpha}"
            if alpha != chosen:
                settings += ", the paper's where nothing is chosen"
            before, after = (hits(source, bench.test, names, one, passes) for one in (PLAIN, pipeline))
            yield line("wise_ft", "Caltech-101", "16", before, after, settings)
            before, after = (hits(source, other.records, other.class_names, one, passes) for one in (PLAIN, pipeline))
            yield line("wise_ft", "CIFAR-10", "16", before, after, f"{settings}; tuned on Caltech-101")


def mixed(tuned: str, alpha: float, source: FeatureSource) -> Pipeline:
    return Pipeline([make_addon(f"wise_ft:tuned={tuned},alpha={alpha}")]).fit(Reference(), source)


def fine_tuned(model: str, source: Any, folder: Path) -> str:
    tokenizers = {TOKENIZER: get_tokenizer(TOKENIZER).encode_ragged}
    build_shards(source, folder / "shards", tokenizers=tokenizers)
    run = load_run(
        "flyp",
        [
            f"run.out={folder / 'run'}", f"model.init={model}", f"data.train={folder / 'shards'}", "run.epochs=10",
            "data.global_batch_size=64", "data.workers=0", "optim.lr=1e-4", "optim.warmup=0.1",
            "optim.precision=fp32",
        ],
    )  # fmt: skip
    pretrain(run)
    return f"run:{folder / 'run'}"


def hits(
    source: FeatureSource, records: Sequence[Record], names: Sequence[str], pipeline: Pipeline, passes: Passes
) -> Tensor:
    table = ClassificationEvaluator(records, names, passes=passes).run(source, pipeline).per_item
    assert table is not None
    return torch.tensor(table.column("hit@1").to_pylist(), dtype=torch.float64)


def line(method: str, data: str, shots: str, plain: Tensor, found: Tensor, settings: str) -> dict[str, Any]:
    change = paired_difference(plain, found, num_permutations=1)
    return whole(method, data, shots, "accuracy", plain.mean().item(), found.mean().item(), change[:3], settings)


def whole(
    method: str, data: str, shots: str, metric: str, plain: float, value: float, change: Sequence[float], settings: str
) -> dict[str, Any]:
    keys = ("method", "slot", "data", "shots", "metric", "plain", "value", "change", "low", "high", "settings", "note")
    return dict(zip(keys, (method, "towers", data, shots, metric, plain, value, *change, settings, ""), strict=True))


def head_ablation(source: FeatureSource, data: Path, model: str) -> Iterator[dict[str, Any]]:
    records, groups = misleading(data)
    half = [row % 4 < 2 for row in range(len(records))]  # both grounds of every class lie in both halves
    looked_at = [record for record, seen in zip(records, half, strict=True) if seen]
    test = [(record, group) for record, group, seen in zip(records, groups, half, strict=True) if not seen]
    passes = Passes(source, workers=1)
    with tempfile.TemporaryDirectory() as folder:
        spans = Path(folder) / "heads.json"
        spans.write_text(json.dumps(described(source, looked_at)))
        images = Part("train", passes.read(looked_at).vectors, None, tuple(looked_at))
        reference = Reference(images=images, class_names=tuple(parse_class(name) for name in THINGS), passes=passes)
        pipeline = Pipeline([make_addon(f"head_ablation:spans={spans},about={ABOUT}")]).fit(reference, source)
    chosen: Any = pipeline.addons[0].state().values["chosen"]
    group = torch.tensor([number for _, number in test])
    shown = [record for record, _ in test]
    before, after = (hits(source, shown, THINGS, one, passes) for one in (PLAIN, pipeline))
    settings = "heads " + " ".join(f"{layer}.{head}" for layer, head in chosen)
    first, second = (by_group(one, group).min().item() for one in (before, after))
    change = resampled(before, after, group)
    yield whole("head_ablation", "CIFAR-10 on grounds", "", "worst group", first, second, change, settings)
    yield line("head_ablation", "CIFAR-10 on grounds", "", before, after, settings)


def misleading(data: Path) -> tuple[list[Record], list[int]]:
    """Images of four classes on grounds of two colours, in turn, and the group of each."""
    found = read_source(str(data / "cifar10_test"))
    records, groups, seen = [], [], dict.fromkeys(THINGS, 0)
    for record in found.records:
        name = found.class_names[record.label or 0]
        if name not in THINGS:
            continue
        cue = seen[name] % 2
        seen[name] += 1
        canvas = Image.new("RGB", (64, 64), CUES[tuple(CUES)[cue]])
        picture = Image.fromarray(read_image(record).permute(1, 2, 0).numpy()).resize((40, 40))
        canvas.paste(picture, (12, 12))
        file = io.BytesIO()
        canvas.save(file, "PNG")
        label = THINGS.index(name)
        records.append(Record(f"{record.key} {cue}", ImageRef(data=file.getvalue()), label=label))
        groups.append(2 * label + cue)
    return records, groups


def decomposed(source: FeatureSource, records: Sequence[Record]) -> Decomposition:
    encoder = source.embedder.encoder
    images = torch.stack([encoder.preprocess(read_image(record)) for record in records])
    parts = [decompose(encoder, part).with_shared_biases() for part in images.split(64)]
    return Decomposition(*(torch.cat(terms) for terms in zip(*parts, strict=True)))


def described(source: FeatureSource, records: Sequence[Record], last_layers: int = 4) -> list[dict[str, Any]]:
    """As `vlkit interpret text_span` writes it."""
    heads = decomposed(source, records).heads
    features = source.embed_texts([f"a photo of {text}" for text in POOL])
    first = heads.shape[1] - last_layers
    lines = []
    for layer in range(first, heads.shape[1]):
        for head in range(heads.shape[2]):
            span = text_span(heads[:, layer, head], features, 1)
            texts = [POOL[row] for row in span.texts]
            lines.append({"layer": layer, "head": head, "explained": span.explained[-1], "texts": texts})
    return lines


def spans(source: FeatureSource, data: Path, model: str) -> Iterator[dict[str, Any]]:
    captioned = [one for one in read_source(str(data / "flickr8k"), split="train").records if one.captions]
    pool = source.embed_texts([record.captions[0] for record in captioned[:NUM_CAPTIONS]])
    found = read_source(str(data / "cifar10_test"))
    parts = decomposed(source, found.records)
    weights = template_weights(source, [(name,) for name in found.class_names], load_templates("simple")).vectors
    labels = torch.tensor([record.label for record in found.records])

    def right(heads: Tensor) -> Tensor:
        return ((parts._replace(heads=heads).total() @ weights.T).argmax(1) == labels).double()

    drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[:NUM_SPANNING]
    whole_feature, greedy, by_chance = (
        right(heads) for heads in (parts.heads, within(parts.heads, pool), within(parts.heads, pool[drawn]))
    )
    settings = f"last four layers, {NUM_SPANNING} of {len(pool)} captions a head"
    for plain, note in ((whole_feature, ""), (by_chance, "; plain: captions drawn at random")):
        one = line("text_span", "CIFAR-10", "", plain, greedy, settings)
        yield {**one, "slot": "interpret", "note": f"sees the test images{note}"}


def within(heads: Tensor, pool: Tensor, last_layers: int = 4) -> Tensor:
    """What the heads of the last layers write, within the span of the texts that TextSpan finds for each."""
    kept = heads.clone()
    for layer in range(heads.shape[1] - last_layers, heads.shape[1]):
        for head in range(heads.shape[2]):
            kept[:, layer, head] = text_span(heads[:, layer, head], pool, NUM_SPANNING).reconstruction
    return kept


def by_group(values: Tensor, group: Tensor) -> Tensor:
    return torch.bincount(group, weights=values) / torch.bincount(group)


def resampled(first: Tensor, second: Tensor, group: Tensor) -> tuple[float, float, float]:
    """Change of the worst group, and its 95% interval: images are drawn anew within their groups."""
    generator = torch.Generator().manual_seed(0)
    members = [(group == one).nonzero().flatten() for one in group.unique()]
    changes = []
    for _ in range(_RESAMPLES):
        drawn = [rows[torch.randint(len(rows), (len(rows),), generator=generator)] for rows in members]
        worst = [min(one[rows].mean().item() for rows in drawn) for one in (first, second)]
        changes.append(worst[1] - worst[0])
    bounds = torch.tensor(changes, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    change = by_group(second, group).min() - by_group(first, group).min()
    return change.item(), bounds[0].item(), bounds[1].item()


PARTS: dict[str, Callable[[FeatureSource, Path, str], Iterator[dict[str, Any]]]] = {
    "wise_ft": wise_ft, "head_ablation": head_ablation, "text_span": spans,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=[*PARTS])
    parser.add_argument("--data", type=Path, default=os.environ.get("VLKIT_DATA"), help="folder of the data sets")
    parser.add_argument("--model", default=f"local-dir:{ENCODER}")
    arguments = parser.parse_args()
    if arguments.data is None or arguments.part is None:
        print("left out: name a part, and --data or VLKIT_DATA, the folder of the data sets")
        return
    source = open_source(arguments.model, "cpu", FeatureCache.default())
    for one in PARTS[arguments.part](source, arguments.data, arguments.model):
        print(json.dumps(one), flush=True)


if __name__ == "__main__":
    main()
