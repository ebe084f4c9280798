"""One training step beside open_clip's own, on the same model, data and batch, on a CPU.

    python tests/benchmarks/train_step.py [--model ViT-S-32] [--batch 64] [--steps 5] [--precision fp32] [--json]
    python tests/benchmarks/train_step.py --only scaling           # 1, 2 and 4 processes with gloo

open_clip's step is its own function, `open_clip_train.train.train_one_epoch`, called with one batch at a time: its
loss with local loss and gathered gradients (exact), AdamW as its main module makes it, images as its loader hands
them over. Ours is what `vlkit train` does: uint8 images, texts cut to the longest of the batch, tiled loss, fused
AdamW, gradient clipping on both sides. Ours and theirs run in turn. Captions have the lengths of Flickr8k's: 7 to 25
tokens, 13 in the mean.

`scaling`: the same global batch on more processes, one thread each: what the exchange of features and gradients and a
second copy of everything else cost. On a machine with fewer cores than processes they share them.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

CAPTION = "a man in red shirt climbs rock face covered with assisted handles two dogs run on wet grass near water"
WORDS = CAPTION.split()


class Line(NamedTuple):
    name: str
    case: str
    ours: float
    peer: float | None
    ratio: float | None  # ours / peer
    unit: str


class Data(NamedTuple):
    """One batch, as drawn."""

    images: Tensor  # (B,3,H,W) uint8
    captions: list[str]


def make_data(batch: int, size: int) -> Data:
    made = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, size, size), generator=made, dtype=torch.uint8)
    lengths = (torch.randn(batch, generator=made) * 4 + 11).round().clamp(5, 23).int().tolist()
    picks = torch.randint(0, len(WORDS), (batch, 23), generator=made).tolist()
    return Data(
        images, [" ".join(WORDS[word] for word in row[:length]) for row, length in zip(picks, lengths, strict=True)]
    )


def our_step(model: str, data: Data, precision: str, loss: str, trim: bool = True) -> Callable[[], float]:
    """One step of ours, on this process's share of the batch."""
    from vlkit.config import load_run
    from vlkit.contracts import ImageTextBatch
    from vlkit.distributed import rank, world_size
    from vlkit.training import assemble
    from vlkit.training.parallel import on_ranks
    from vlkit.training.sharded import scale_gradients, total_norm

    run = load_run(
        {
            "run": {"out": "unused", "steps": 1, "device": "cpu"},
            "model": {"name": model},
            "data": {"train": "unused", "global_batch_size": len(data.images)},
            "loss": {loss: 1.0},
            "optim": {"precision": precision, "clip_norm": 1.0},
        }
    )
    encoder, module, optimizer, *_ = assemble.build_learner(run, torch.device("cpu"))
    encoder._stops_at_end = trim and encoder._stops_at_end  # type: ignore[attr-defined]
    share = len(data.images) // world_size()
    rows = slice(rank() * share, (rank() + 1) * share)
    own = torch.arange(share)
    batch = ImageTextBatch(
        images=data.images[rows],
        tokens=encoder.tokenize(data.captions[rows]),
        text_to_image=own,
        ids=own,
        caption_hash=own,
        valid=torch.ones(share, dtype=torch.bool),
        extra={},
        keys=[""] * share,
    )
    parallel = on_ranks(module, "ddp", torch.device("cpu"))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        output = parallel.model(batch, 0)
        output.total.backward()
        parallel.finish(module.parameters())
        scale_gradients(parameters, total_norm([p.grad for p in parameters if p.grad is not None]), 1.0)
        optimizer.step()
        return float(output.total.detach())

    return step


def their_step(model: str, data: Data, precision: str, loss: str) -> Callable[[], float]:
    """One step of open_clip 3.3.0's own trainer."""
    import open_clip
    from open_clip.loss import SigLipLoss
    from open_clip_train.train import train_one_epoch

    bias = {"init_logit_bias": -10.0} if loss == "sigmoid" else {}
    theirs, _, _ = open_clip.create_model_and_transforms(model, output_dict=True, **bias)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (theirs.visual.image_mean, theirs.visual.image_std))
    images = (data.images.float() / 255 - mean) / std
    texts = open_clip.get_tokenizer(model)(data.captions)
    plain = [p for n, p in theirs.named_parameters() if p.ndim < 2 or "bn" in n or "ln" in n or "logit_scale" in n]
    others = {id(parameter) for parameter in plain}
    groups = [
        {"params": plain, "weight_decay": 0.0},
        {"params": [p for p in theirs.parameters() if id(p) not in others], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6)
    criterion = (
        SigLipLoss()
        if loss == "sigmoid"
        else open_clip.ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True)
    )
    loader = _OneBatch((images, texts))
    source = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)}
    arguments = SimpleNamespace(
        device="cpu",
        precision={"bf16": "amp_bf16"}.get(precision, precision),
        accum_freq=1,
        distill=False,
        skip_scheduler=True,
        grad_clip_norm=1.0,
        horovod=False,
        rank=0,
        local_rank=0,
        world_size=1,
        batch_size=len(images),
        log_every_n_steps=10**9,
        wandb=False,
        log_local=False,
    )

    def step() -> float:
        train_one_epoch(theirs, source, criterion, 0, optimizer, None, None, None, arguments)
        return 0.0

    return step


class _OneBatch(list[Any]):
    """What open_clip's loop asks of a loader."""

    num_batches = 1

    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        super().__init__([batch])
        self.num_samples = len(batch[0])


def seconds_in_turn(steps: dict[str, Callable[[], float]], count: int) -> dict[str, float]:
    """Median time of a step of each; they alternate after one step of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(count + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_steps(arguments: argparse.Namespace, data: Data) -> Iterator[Line]:
    for loss in arguments.losses.split(","):
        case = f"{arguments.model}, B={arguments.batch}, {arguments.precision}, {loss}"
        steps = {
            "ours": our_step(arguments.model, data, arguments.precision, loss),
            "whole texts": our_step(arguments.model, data, arguments.precision, loss, trim=False),
            "theirs": their_step(arguments.model, data, arguments.precision, loss),
        }
        seconds = seconds_in_turn(steps, arguments.steps)
        ours, theirs = seconds["ours"], seconds["theirs"]
        yield Line("step time", case, ours, theirs, ours / theirs, "s")
        speeds = [arguments.batch / value for value in (ours, theirs)]
        yield Line("samples per second", case, speeds[0], speeds[1], speeds[0] / speeds[1], "1/s")
        yield Line(
            "step time, texts not cut", case, seconds["whole texts"], theirs, seconds["whole texts"] / theirs, "s"
        )


def measure_scaling(arguments: argparse.Namespace) -> Iterator[Line]:
    first = None
    for processes in (1, 2, 4):
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"),
            *(__file__, "--worker", "--model", arguments.model, "--batch", str(arguments.batch)),
            *("--steps", str(arguments.steps), "--precision", arguments.precision),
        ]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        seconds = float(done.stdout.strip().splitlines()[-1])
        first = first or seconds
        case = f"{arguments.model}, B={arguments.batch} over {processes} process(es), {os.cpu_count()} cores"
        yield Line("step time, gloo", case, seconds, first, seconds / first, "s (peer: one process)")


def work(arguments: argparse.Namespace) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    data = make_data(arguments.batch, arguments.size)
    step = our_step(arguments.model, data, arguments.precision, "clip")
    seconds = seconds_in_turn({"ours": step}, arguments.steps)["ours"]
    if dist.get_rank() == 0:
        print(seconds)
    dist.destroy_process_group()


def show(line: Line, as_json: bool) -> None:
    if as_json:
        print(json.dumps(line._asdict()), flush=True)
        return
    peer = ["-", "-"] if line.peer is None else [f"{line.peer:.3f}", f"{line.ratio:.2f}"]
    print(
        "{:<26} {:<42} {:>9} {:>9} {:>6} {}".format(line.name, line.case, f"{line.ours:.3f}", *peer, line.unit),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-S-32", help="an architecture of open_clip")
    parser.add_argument("--size", type=int, default=224, help="image size of the architecture")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--losses", default="clip,sigmoid")
    parser.add_argument("--only", choices=("steps", "scaling"))
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.worker:
        work(arguments)
        return
    logging.getLogger().setLevel(logging.WARNING)
    if arguments.only != "scaling":
        for line in measure_steps(arguments, make_data(arguments.batch, arguments.size)):
            show(line, arguments.json)
    if arguments.only != "steps":
        for line in measure_scaling(arguments):
            show(line, arguments.json)


if __name__ == "__main__":
    main()
