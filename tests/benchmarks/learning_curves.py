"""vlkit's recipe for Flickr8k beside open_clip's own trainer, at equal time, with the same model and seeds.

    vlkit shards build $VLKIT_DATA/flickr8k --split train --max-side 96 --out shards/flickr8k-train
    vlkit shards build $VLKIT_DATA/flickr8k --split dev --max-side 96 --out shards/flickr8k-dev
    python tests/benchmarks/learning_curves.py --train shards/flickr8k-train --dev shards/flickr8k-dev \\
        --data $VLKIT_DATA/flickr8k --minutes 4 --seeds 0,1,2 --out runs/curves

open_clip's side is `open_clip_train.main` (which imports pandas) as its README starts it: webdataset shards with one
caption a sample (the same small JPEGs), amp_bf16, and of our run file whatever its command has a flag for: model,
batch, learning rate, betas, weight decay, warm-up, clipping, crops, flips, colours. Dropping caption tokens and several
captions an image have none. First each side takes a few steps alone to learn how long one lasts (the fast quarter of
them), then as many as fit into the time, so that other work on the machine changes no result. At each of `--points`
equal parts of the way recall@10 is measured on the dev split with the same evaluator; nothing is chosen there.
"""

import argparse
import json
import re
import statistics
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

DIRECTIONS = ("image_to_text/recall@10", "text_to_image/recall@10")
RECIPE = "flickr8k_small"
NAME = "learning-curves"  # of the architecture, in open_clip's registry


class Point(NamedTuple):
    """One measurement."""

    trainer: str
    seed: int
    minutes: float
    samples: int
    recall: dict[str, float]


def recipe(arguments: argparse.Namespace, *overrides: str) -> Any:
    from vlkit.config import load_run

    return load_run(RECIPE, [f"data.train={arguments.train}", f"data.val={arguments.dev}", *overrides])


# --- ours ---------------------------------------------------------------------------------------------------------


def pretrain_ours(arguments: argparse.Namespace, seed: int, steps: int, out: Path) -> list[dict[str, Any]]:
    """A run of so many steps; the lines of its metrics."""
    from eval.in_training import make_every
    from vlkit.training.metrics import read_metrics
    from vlkit.training.pretrain import pretrain

    part = f"{max(1, steps // arguments.points)} steps"
    entry = f"{{name = 'retrieval', every = '{part}'}}" if steps > arguments.try_steps else ""
    run = recipe(
        arguments,
        *(f"run.out={out}", f"run.seed={seed}", f"run.steps={steps}", f"eval=[{entry}]"),
        f"checkpoint.every='{part}'",
    )
    pretrain(run, every=make_every(run), resume=(out / "checkpoints").exists(), say=lambda remark: None)
    return list(read_metrics(out / "metrics.jsonl"))


def ours(arguments: argparse.Namespace, seed: int) -> Iterator[Point]:
    tried = pretrain_ours(arguments, 0, arguments.try_steps, arguments.out / "ours-tried")
    steps = steps_in(arguments, [after["seconds"] - before["seconds"] for before, after in pairwise(tried[1:])])
    for line in pretrain_ours(arguments, seed, steps, arguments.out / f"ours-{seed}"):
        if "eval" in line and line["step"] <= steps // arguments.points * arguments.points:
            recall = {name: line["eval"][name] for name in DIRECTIONS}
            yield Point("vlkit", seed, line["step"] / steps * arguments.minutes, line["samples"], recall)


def steps_in(arguments: argparse.Namespace, times: list[float]) -> int:
    """As many as fit, a multiple of the points."""
    fit = int(arguments.minutes * 60 / statistics.quantiles(times, n=4)[0])
    return fit // arguments.points * arguments.points


# --- open_clip's ---------------------------------------------------------------------------------------------------


def write_pairs(train: Path, out: Path) -> int:
    """Shards with one caption a sample, as open_clip's loader wants them; the number of samples."""
    import webdataset as wds

    count = 0
    if (out / "count.json").exists():
        return int(json.loads((out / "count.json").read_text()))
    out.mkdir(parents=True)
    for tar in sorted(train.glob("*.tar")):
        with wds.TarWriter(str(out / tar.name)) as writer:
            for sample in wds.WebDataset(str(tar), shardshuffle=False):
                for number, caption in enumerate(sample["txt"].decode().splitlines()):
                    writer.write({"__key__": f"{sample['__key__']}-{number}", "jpg": sample["jpg"], "txt": caption})
                    count += 1
    (out / "count.json").write_text(json.dumps(count))
    return count


def register(run: Any, folder: Path) -> None:
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(run.model.architecture))
    open_clip.add_model_config(folder)


def train_theirs(arguments: argparse.Namespace, seed: int, steps: int, name: str, parts: int) -> Path:
    """open_clip's command, its run in `parts` epochs of equally many steps; the folder of its run."""
    from open_clip_train.main import main as train

    run = recipe(arguments)
    register(run, arguments.out / "architecture")
    write_pairs(arguments.train, arguments.out / "pairs")
    folder = arguments.out / name
    if (folder / "checkpoints" / f"epoch_{parts}.pt").exists():
        return folder
    shards = len(list((arguments.out / "pairs").glob("*.tar")))
    optim, augment, batch = run.optim, run.data.augment, run.data.global_batch_size
    flags: dict[str, Any] = {
        "train-data": arguments.out / "pairs" / f"{{00000..{shards - 1:05d}}}.tar",
        "train-num-samples": steps // parts * batch,
        **{"dataset-type": "webdataset", "model": NAME, "device": "cpu", "precision": "amp_bf16", "workers": 0},
        **{"batch-size": batch, "epochs": parts, "lr": optim.lr, "beta1": optim.betas[0], "beta2": optim.betas[1]},
        **{"eps": optim.eps, "wd": optim.weight_decay, "warmup": max(1, round(optim.warmup * steps))},
        **{"grad-clip-norm": optim.clip_norm, "seed": seed, "logs": arguments.out, "name": name},
        "log-every-n-steps": 1,
    }
    crops = [
        *("use_timm=True", f"scale={tuple(augment.crop_scale)}", f"hflip={augment.hflip}"),
        *(f"color_jitter={tuple(augment.color_jitter)}", "color_jitter_prob=1.0"),
        f"gray_scale_prob={augment.grayscale}",
    ]
    resume = ["--resume", "latest"] if (folder / "checkpoints").exists() else []
    train([*(word for key, value in flags.items() for word in (f"--{key}", str(value))), *resume, "--aug-cfg", *crops])
    return folder


def their_step_times(folder: Path) -> list[float]:
    """Seconds of each step, from its log."""
    found = re.findall(r"Batch \(t\): ([0-9.]+)", (folder / "out.log").read_text())
    return [float(seconds) for seconds in found]


def theirs(arguments: argparse.Namespace, seed: int) -> Iterator[Point]:
    tried = train_theirs(arguments, 0, arguments.try_steps, "open_clip-tried", 1)
    steps = steps_in(arguments, their_step_times(tried)[1:])
    folder = train_theirs(arguments, seed, steps, f"open_clip-{seed}", arguments.points)
    batch = recipe(arguments).data.global_batch_size
    for part in range(1, arguments.points + 1):
        share = part / arguments.points
        recall = measure(arguments, folder / "checkpoints" / f"epoch_{part}.pt")
        yield Point("open_clip", seed, share * arguments.minutes, round(share * steps) * batch, recall)


def measure(arguments: argparse.Namespace, checkpoint: Path) -> dict[str, float]:
    """Recall@10 of a checkpoint of open_clip's trainer on the dev split."""
    import torch

    from eval.retrieval import RetrievalEvaluator
    from vlkit import load_embedder
    from vlkit.data.sources import read_source
    from vlkit.models.open_clip_encoder import build_encoder
    from vlkit.models.saved import save_encoder

    encoder = build_encoder(recipe(arguments).model.architecture)
    encoder.model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    records = read_source(str(arguments.data), split="dev").records
    with tempfile.TemporaryDirectory() as folder:
        embedder = load_embedder(f"local-dir:{save_encoder(encoder, Path(folder) / 'model')}")
        metrics = RetrievalEvaluator(records).run(embedder).metrics
    return {name: metrics[name] for name in DIRECTIONS}


# --- both ----------------------------------------------------------------------------------------------------------


def show(points: list[Point]) -> None:
    """Mean over seeds, and the lowest and highest, at each point of the way."""
    print(f"{'minutes':>7}  {'trainer':<10} {'samples':>8}   {'image to text R@10':<24} {'text to image R@10':<24}")
    for minutes, trainer in sorted({(round(point.minutes, 2), point.trainer) for point in points}):
        here = [point for point in points if (round(point.minutes, 2), point.trainer) == (minutes, trainer)]
        cells = []
        for direction in DIRECTIONS:
            values = [100 * point.recall[direction] for point in here]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        print(f"{minutes:>7.1f}  {trainer:<10} {here[0].samples:>8}   {cells[0]:<24} {cells[1]:<24}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="training shards of Flickr8k")
    parser.add_argument("--dev", type=Path, required=True, help="shards of its dev split")
    parser.add_argument("--data", type=Path, required=True, help="the folder of Flickr8k")
    parser.add_argument("--out", type=Path, required=True, help="where the runs go, and where a later call goes on")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--try-steps", type=int, default=24)
    parser.add_argument("--json", action="store_true", help="one object a line")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    points = []
    for seed in (int(number) for number in arguments.seeds.split(",")):
        for side in (ours, theirs):
            for point in side(arguments, seed):
                points.append(point)
                if arguments.json:
                    print(json.dumps(point._asdict()), flush=True)
    if not arguments.json:
        show(points)


if __name__ == "__main__":
    main()
