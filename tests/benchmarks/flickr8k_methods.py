"""Ways of pretraining beside plain CLIP on Flickr8k, each for the same time, with the same seeds.

    vlkit shards build $VLKIT_DATA/flickr8k --split train --max-side 96 --out shards/flickr8k-train
    python tests/benchmarks/flickr8k_methods.py --data $VLKIT_DATA/flickr8k --train shards/flickr8k-train \\
        --trained runs/flickr8k_small --minutes 5 --seeds 0,1,2 --out runs/methods

First every method takes a few steps in turn, with nothing else running, to learn how long one lasts; then each is
trained for as many as fit into the time, with the schedule of a run of this length. Equal time is thus equal measured
cost: what else runs during the trainings, and whether they were interrupted, changes no result. Run again, the command
goes on where it stopped. Recall@10 is measured on the 1,000 test images with their 5 captions, with bootstrap
intervals over images; the distance to the plain run is paired, query by query and seed by seed. Nothing is chosen
there. `--trained` names a run of `flickr8k_small`: the teacher of the
distillation, and the frozen image tower of LiT; what it cost to train is not counted. FLIP needs a vision transformer
and so has a plain run of its own beside it.
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

DIRECTIONS = ("image_to_text/recall@10", "text_to_image/recall@10")


class Method(NamedTuple):
    """A run file with what is changed in it."""

    base: str
    overrides: tuple[str, ...]
    beside: str  # the plain run it is compared with
    needs_trained: bool = False


METHODS = {
    "clip": Method("flickr8k_small", (), "clip"),
    "sigmoid": Method("flickr8k_small", ("loss={sigmoid = 1.0}",), "clip"),
    "fast_clip": Method("flickr8k_small", ("loss={fast_clip = {rho = 6.5}}", "optim.logit_scale_lr=2e-4"), "clip"),
    "teacher": Method(
        "flickr8k_small", ("loss={clip = 1.0, distillation = {weight = 1.0, teacher = '{teacher}'}}",), "clip", True
    ),
    "lit": Method("flickr8k_small", ("model.init={lit}", "model.freeze=['image']"), "clip", True),
    "clip_vit": Method("flickr8k_vit", (), "clip_vit"),
    "flip": Method("flickr8k_vit", ("model.patch_dropout=0.5",), "clip_vit"),
    "muon": Method("flickr8k_vit", ("optim.name=muon", "optim.lr=2e-3", "optim.matrix_lr=6e-3"), "clip_vit"),
}


class Result(NamedTuple):
    """One trained model."""

    method: str
    seed: int
    steps: int
    epochs: float
    seconds: float
    recall: Mapping[str, float]
    hits: Mapping[str, list[float]]  # of each query of a direction, at 10
    image: Mapping[str, list[str]]  # and the image it belongs to


def count_steps(names: Sequence[str], arguments: argparse.Namespace) -> dict[str, int]:
    """How many steps of each method fit into the time; kept in `steps.json` for a later call."""
    kept = arguments.out / "steps.json"
    steps: dict[str, int] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in names:
        if name not in steps:
            tried = _pretrain(name, 0, arguments.out / f"{name}-tried", arguments.try_steps, arguments)
            steps[name] = steps_in(tried, arguments.minutes * 60)
            kept.write_text(json.dumps(steps))
    return steps


def steps_in(tried: Path, seconds: float) -> int:
    """How many steps fit into a time, after the run of a few."""
    from vlkit.training.metrics import read_metrics

    times = [line["seconds"] for line in read_metrics(tried / "metrics.jsonl")]
    # The first step brings what is loaded on first use; the slow ones were interrupted.
    each = statistics.quantiles([after - before for before, after in pairwise(times[1:])], n=4)[0]
    return max(10, int(seconds / each))


def _pretrain(name: str, seed: int, out: Path, steps: int, arguments: argparse.Namespace) -> Path:
    from vlkit.config import load_run
    from vlkit.training.pretrain import pretrain

    method = METHODS[name]
    lit = prepare_lit(arguments.trained, seed, arguments.out) if name == "lit" else ""
    changes = [
        override.replace("{teacher}", f"run:{arguments.trained}").replace("{lit}", lit) for override in method.overrides
    ]
    common = [
        *(f"run.out={out}", f"run.seed={seed}", f"run.steps={steps}", f"data.train={arguments.train}"),
        *("eval=[]", "checkpoint.every='100000 steps'", f"optim.precision={arguments.precision}"),
    ]
    run = load_run(method.base, [*common, *changes])
    # Without the dev split, which nothing here reads.
    run = run.model_copy(update={"data": run.data.model_copy(update={"val": None})})
    return pretrain(run, resume=(out / "checkpoints").exists(), say=lambda remark: None)


def prepare_lit(trained: Path, seed: int, out: Path) -> str:
    """A model folder with the trained image tower and a text tower with random weights."""
    import torch

    from vlkit.models.load import load_encoder
    from vlkit.models.open_clip_encoder import build_encoder
    from vlkit.models.saved import save_encoder

    source = load_encoder(f"run:{trained}")
    torch.manual_seed(seed)
    fresh = build_encoder(source.record()["model_cfg"], preprocess=source.record()["preprocess_cfg"])
    weights = {name: value for name, value in source.weights().items() if name.startswith("visual.")}
    fresh.model.load_state_dict(weights, strict=False)
    return f"local-dir:{save_encoder(fresh, out / f'lit-start-{seed}')}"


def evaluate(
    folder: Path, data: Path
) -> tuple[Mapping[str, float], Mapping[str, list[float]], Mapping[str, list[str]]]:
    """Recall@10 in both directions on the test split, whether each query hit, and the image of each query."""
    from eval.retrieval import RetrievalEvaluator
    from vlkit import load_embedder
    from vlkit.data.sources import read_source

    evaluation = RetrievalEvaluator(read_source(str(data), split="test").records).run(load_embedder(f"run:{folder}"))
    assert evaluation.per_item is not None
    rows = evaluation.per_item.to_pylist()
    own = {name: [row for row in rows if row["direction"] == name.split("/")[0]] for name in DIRECTIONS}
    return (
        {name: evaluation.metrics[name] for name in DIRECTIONS},
        {name: [row["hit@10"] for row in own[name]] for name in DIRECTIONS},
        {name: [row["key"] for row in own[name]] for name in DIRECTIONS},
    )


def run_one(name: str, seed: int, steps: int, arguments: argparse.Namespace) -> Result:
    """Train and measure one model, or read what an earlier call measured."""
    folder = arguments.out / f"{name}-{seed}"
    kept = folder.with_suffix(".json")
    if kept.exists():
        return Result(**json.loads(kept.read_text()))
    from vlkit.training.metrics import read_metrics

    began = time.perf_counter()
    _pretrain(name, seed, folder, steps, arguments)
    last = list(read_metrics(folder / "metrics.jsonl"))[-1]
    logging.info("%s, seed %d: %.0f s in all", name, seed, time.perf_counter() - began)
    result = Result(name, seed, steps, last["epoch"], last["seconds"], *evaluate(folder, arguments.data))
    kept.write_text(json.dumps(result._asdict()))
    return result


def table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row a method: means over seeds, and the distance to the plain runs of the same seeds with its interval."""
    rows = []
    for name in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == name]
        plain = {result.seed: result for result in results if result.method == METHODS[name].beside}
        row: dict[str, Any] = {"method": name, "beside": METHODS[name].beside, "seeds": len(own)}
        row["steps"], row["epochs"] = own[0].steps, statistics.mean(result.epochs for result in own)
        for direction in DIRECTIONS:
            key = direction.split("/")[0]
            row[key] = statistics.mean(result.recall[direction] for result in own)
            row[f"{key}_interval"] = interval(own, direction)
            pairs = [(plain[one.seed], one) for one in own if one.seed in plain and name != METHODS[name].beside]
            row[f"{key}_gap"] = gap(pairs, direction) if pairs else None
        rows.append(row)
    return rows


def interval(own: Sequence[Result], direction: str) -> tuple[float, float]:
    """Of the mean over seeds; images are drawn with all their queries of all seeds."""
    hits = [one.hits[direction] for one in own]
    _, low, high = _paired([[0.0] * len(one) for one in hits], hits, own[0].image[direction])
    return low, high


def gap(pairs: Sequence[tuple[Result, Result]], direction: str) -> tuple[float, float, float]:
    """Mean distance to the plain runs, and its 95% interval."""
    first = [plain.hits[direction] for plain, _ in pairs]
    second = [one.hits[direction] for _, one in pairs]
    return _paired(first, second, pairs[0][1].image[direction])


def _paired(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], images: Sequence[str]
) -> tuple[float, float, float]:
    """Of several seeds' hits; `images` names the image of each query."""
    import torch

    from eval.metrics import paired_difference

    places = {key: place for place, key in enumerate(dict.fromkeys(images))}
    units = torch.tensor([places[key] for key in images]).repeat(len(first))
    one, other = (torch.tensor(hits).flatten() for hits in (first, second))
    found = paired_difference(one, other, units=units, num_permutations=1)
    return found.difference, found.low, found.high


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"{'method':<10} {'steps':>6} {'epochs':>7}   {'image to text R@10':<52} {'text to image R@10':<52}")
    for row in rows:
        cells = []
        for key in ("image_to_text", "text_to_image"):
            low, high = row[f"{key}_interval"]
            beside = ""
            if row[f"{key}_gap"] is not None:
                change, least, most = row[f"{key}_gap"]
                beside = f" {100 * change:+.1f} [{100 * least:+.1f}, {100 * most:+.1f}] beside {row['beside']}"
            cells.append(f"{100 * row[key]:.1f} [{100 * low:.1f}, {100 * high:.1f}]{beside}")
        print(f"{row['method']:<10} {row['steps']:>6} {row['epochs']:>7.1f}   {cells[0]:<52} {cells[1]:<52}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of Flickr8k")
    parser.add_argument("--train", type=Path, required=True, help="its training shards")
    parser.add_argument("--trained", type=Path, help="a run of flickr8k_small, for teacher and lit")
    parser.add_argument("--out", type=Path, required=True, help="where the runs go, and where a later call goes on")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--try-steps", type=int, default=24)
    parser.add_argument("--json", action="store_true", help="one object a line: each run, then each row of the table")
    arguments = parser.parse_args()
    names = [name for name in arguments.methods.split(",") if arguments.trained or not METHODS[name].needs_trained]
    arguments.out.mkdir(parents=True, exist_ok=True)
    steps = count_steps(names, arguments)
    results = []
    for seed in (int(number) for number in arguments.seeds.split(",")):
        for name in names:
            results.append(run_one(name, seed, steps[name], arguments))
            if arguments.json:
                brief = {key: value for key, value in results[-1]._asdict().items() if key not in ("hits", "image")}
                print(json.dumps(brief), flush=True)
    rows = table(results)
    if arguments.json:
        for row in rows:
            print(json.dumps(row), flush=True)
    else:
        show(rows)


if __name__ == "__main__":
    main()
