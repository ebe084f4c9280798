"""Time and memory of the PACL term in Gram form beside the pooled form, on a CPU or GPU; equal values and gradients.

    python tests/benchmarks/patch_alignment.py [--sizes 256,512,1024] [--patches 196] [--width 512] [--json]
    python tests/benchmarks/patch_alignment.py --device cuda --sizes 1024,2048

The pooled form makes the vector of every image for every text, (B,B,D), as the equations stand; the Gram form never
does. Both get the same patches and texts (fp32), run in turn, forward and backward; on a CPU seconds are CPU time.
Memory is what autograd keeps for backward as the sum of the distinct storages it saves, and the peak that a process of
its own reaches above its inputs (on a GPU: the allocator's peak).
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
from process_memory import peak_rise, saved_bytes
from torch import Tensor

from vlkit.losses.patch_alignment import patch_alignment_loss

MIB = 1 << 20
ATTENTION = 10.0
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Line(NamedTuple):
    name: str
    case: str
    gram: float
    pooled: float
    ratio: float  # gram / pooled
    unit: str


def gram_form(patches: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return patch_alignment_loss(patches, text, scale, ATTENTION)


def pooled_form(patches: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """As the equations stand, in three products."""
    attention = (ATTENTION * F.normalize(patches, dim=-1) @ text.T).softmax(dim=1)  # (B,P,B)
    pooled = F.normalize(attention.transpose(1, 2) @ patches, dim=-1)  # (B,B,D)
    logits = scale * (pooled * text).sum(dim=-1)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


FORMS: dict[str, Loss] = {"gram": gram_form, "pooled": pooled_form}


def make_inputs(rows: int, options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    patches = torch.randn(rows, options.patches, options.width, generator=made).to(options.device).requires_grad_()
    text = F.normalize(torch.randn(rows, options.width, generator=made), dim=1).to(options.device)
    return patches, text, torch.tensor(20.0, device=options.device)


def kept_for_backward(loss: Loss, rows: int, options: argparse.Namespace) -> int:
    inputs = make_inputs(rows, options)
    return saved_bytes(lambda: loss(*inputs), inputs)


def peak_alone(form: str, rows: int, options: argparse.Namespace) -> int:
    """Bytes above the inputs that forward and backward reach at most, in a process of its own."""
    given = {"sizes": rows, **{name: getattr(options, name) for name in ("patches", "width", "device", "threads")}}
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, __file__, "--peak-of", form, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


def measure_peak(form: str, rows: int, options: argparse.Namespace) -> None:
    loss = FORMS[form]
    loss(*make_inputs(8, options)).backward()  # what is loaded on first use is not what the loss takes
    inputs = make_inputs(rows, options)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(*inputs).backward()
        print(torch.cuda.max_memory_allocated() - before)
        return
    print(peak_rise(lambda: loss(*inputs).backward()))


def seconds_in_turn(rows: int, options: argparse.Namespace) -> dict[str, float]:
    inputs = make_inputs(rows, options)
    # CPU time: other work on the machine hardly counts. A GPU has a clock of its own.
    clock = time.perf_counter if options.device == "cuda" else time.process_time
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for repeat in range(options.repeats + 1):
        for form, loss in FORMS.items():
            began = clock()
            torch.autograd.grad(loss(*inputs), inputs[:1])
            if options.device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first warms up
                times[form].append(clock() - began)
    return {form: statistics.median(values) for form, values in times.items()}


def largest_difference(rows: int, options: argparse.Namespace) -> tuple[float, float]:
    """Of the values, and of the gradients by patches, relative to the largest gradient."""
    inputs = make_inputs(rows, options)
    values = {form: loss(*inputs) for form, loss in FORMS.items()}
    gradients = {form: torch.autograd.grad(value, inputs[:1])[0] for form, value in values.items()}
    apart = (gradients["gram"] - gradients["pooled"]).abs().max() / gradients["pooled"].abs().max()
    return abs(values["gram"].item() - values["pooled"].item()), apart.item()


def measure(rows: int, options: argparse.Namespace) -> Iterator[Line]:
    case = f"B={rows}, P={options.patches}, D={options.width}"

    def line(name: str, gram: float, pooled: float, unit: str) -> Line:
        return Line(name, case, gram, pooled, gram / pooled, unit)

    seconds = seconds_in_turn(rows, options)
    yield line("forward and backward", seconds["gram"], seconds["pooled"], "s")
    saved = {form: kept_for_backward(loss, rows, options) / MIB for form, loss in FORMS.items()}
    yield line("kept for backward", saved["gram"], saved["pooled"], "MiB")
    peak = {form: peak_alone(form, rows, options) / MIB for form in FORMS}
    yield line("peak above inputs", peak["gram"], peak["pooled"], "MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="256,512,1024")
    parser.add_argument("--patches", type=int, default=196)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak-of", choices=[*FORMS], help="used by the script itself")
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = [int(size) for size in options.sizes.split(",")]
    if options.peak_of:
        measure_peak(options.peak_of, sizes[0], options)
        return
    if not options.json:
        print("{:<22} {:<24} {:>10} {:>10} {:>7} {}".format("what", "case", "gram", "pooled", "ratio", "unit"))
    for rows in sizes:
        apart = largest_difference(rows, options)
        if max(apart) > 1e-3:
            raise SystemExit(f"B={rows}: the two forms differ by {apart[0]:.2g} (value), {apart[1]:.2g} (gradient).")
        for one in measure(rows, options):
            show(one, options.json)
        show_difference(rows, apart, options.json)


def show(line: Line, as_json: bool) -> None:
    if as_json:
        print(json.dumps(line._asdict()), flush=True)
        return
    cells: list[Any] = [line.name, line.case, f"{line.gram:.3f}", f"{line.pooled:.3f}", f"{line.ratio:.2f}", line.unit]
    print("{:<22} {:<24} {:>10} {:>10} {:>7} {}".format(*cells), flush=True)


def show_difference(rows: int, apart: tuple[float, float], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"name": "difference", "case": f"B={rows}", "value": apart[0], "gradient": apart[1]}))
    else:
        print(f"B={rows}: values differ by {apart[0]:.1e}, gradients by {apart[1]:.1e} of the largest", flush=True)


if __name__ == "__main__":
    main()
