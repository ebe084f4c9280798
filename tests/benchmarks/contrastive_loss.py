"""Time and memory of the losses over all pairs, beside open_clip's ClipLoss and SigLipLoss, on a CPU.

    python tests/benchmarks/contrastive_loss.py [--sizes 1024,...,16384] [--alone ''] [--threads 2] [--json]
    python tests/benchmarks/contrastive_loss.py --sizes '' --alone 32768,65536 --measure saved,resident

Ours and theirs run in turn on the same features (fp32, D = 512). What a loss keeps for backward, above its inputs, is
measured twice: as the tensors that autograd saves, and as resident memory between forward and backward in a process
of its own, from which freed memory has been given back. `--alone` names sizes at which only ours runs: open_clip
keeps 36 GiB at 65536. Forward and backward at 65536 are 1.8e13 operations in ours, minutes on a few cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from process_memory import resident_bytes, saved_bytes
from torch import Tensor

WIDTH = 512
MIB = 1 << 20
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Line(NamedTuple):
    name: str
    case: str
    ours: float
    peer: float | None
    ratio: float | None  # ours / peer
    unit: str


def our_loss(kind: str) -> Loss:
    from vlkit.losses import clip_loss, sigmoid_loss

    return (lambda image, text, scale, bias: clip_loss(image, text, scale)) if kind == "clip" else sigmoid_loss


def their_loss(kind: str) -> Loss:
    import open_clip
    from open_clip.loss import SigLipLoss

    if kind == "sigmoid":
        return SigLipLoss()
    loss = open_clip.ClipLoss()
    return lambda image, text, scale, bias: loss(image, text, scale)


def make_inputs(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(rows, WIDTH, generator=made), dim=1).requires_grad_() for _ in range(2))
    return image, text, torch.tensor(20.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)


def kept_for_backward(loss: Loss, rows: int) -> int:
    inputs = make_inputs(rows)
    return saved_bytes(lambda: loss(*inputs), inputs)


def resident_between(whose: str, kind: str, rows: int) -> int:
    """Bytes by which a process of its own grew between before forward and before backward."""
    command = [sys.executable, __file__, "--resident", whose, kind, str(rows)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


def measure_resident(whose: str, kind: str, rows: int) -> None:
    loss = our_loss(kind) if whose == "ours" else their_loss(kind)
    loss(*make_inputs(64)).backward()  # what is loaded on first use is not what the loss keeps
    inputs = make_inputs(rows)
    before = resident_bytes()
    value = loss(*inputs)
    print(resident_bytes() - before)
    assert value.requires_grad


def seconds_in_turn(ours: Loss, theirs: Loss | None, rows: int) -> tuple[float, float | None]:
    """Median time of forward and backward; the two alternate, so that both see the same machine."""
    inputs = make_inputs(rows)
    repeats, warm_up = max(1, 4096 * 5 // rows), rows <= 8192
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + warm_up):
        for position, loss in enumerate((ours, theirs)):
            if loss is None:
                continue
            began = time.perf_counter()
            torch.autograd.grad(loss(*inputs), inputs, allow_unused=True)
            if repeat >= warm_up:
                times[position].append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1]) if times[1] else None


def measure(kind: str, rows: int, with_peer: bool, what: list[str]) -> Iterator[Line]:
    ours, theirs = our_loss(kind), their_loss(kind) if with_peer else None
    case = f"{kind}, B={rows}"

    def line(name: str, mine: float, other: float | None, unit: str) -> Line:
        return Line(name, case, mine, other, None if other is None else mine / other, unit)

    if "time" in what:
        yield line("forward and backward", *seconds_in_turn(ours, theirs, rows), "s")
    if "saved" in what:
        saved = [kept_for_backward(loss, rows) / MIB for loss in (ours, theirs) if loss is not None]
        yield line("kept, saved tensors", saved[0], saved[1] if with_peer else None, "MiB")
    if "resident" in what:
        grown = [resident_between(whose, kind, rows) / MIB for whose in ("ours", "theirs")[: 1 + with_peer]]
        yield line("kept, resident", grown[0], grown[1] if with_peer else None, "MiB")


def show(line: Line, as_json: bool) -> None:
    if as_json:
        print(json.dumps(line._asdict()), flush=True)
        return
    peer = ["-", "-"] if line.peer is None else [f"{line.peer:.3f}", f"{line.ratio:.2f}"]
    cells: list[Any] = [line.name, line.case, f"{line.ours:.3f}", *peer, line.unit]
    print("{:<22} {:<20} {:>10} {:>10} {:>7} {}".format(*cells), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--resident"]:
        measure_resident(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1024,2048,4096,8192,16384")
    parser.add_argument("--alone", default="", help="sizes at which only ours runs; '' for none")
    parser.add_argument("--kinds", default="clip,sigmoid")
    parser.add_argument("--measure", default="time,saved,resident")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--json", action="store_true", help="one object a line")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not arguments.json:
        print("{:<22} {:<20} {:>10} {:>10} {:>7} {}".format("what", "case", "vlkit", "open_clip", "ratio", "unit"))
    for kind in arguments.kinds.split(","):
        for sizes, with_peer in ((arguments.sizes, True), (arguments.alone, False)):
            for rows in (int(size) for size in sizes.split(",") if size):
                for line in measure(kind, rows, with_peer, arguments.measure.split(",")):
                    show(line, arguments.json)


if __name__ == "__main__":
    main()
