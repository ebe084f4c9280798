"""Time and memory of image-text recall in both directions, beside CLIP_benchmark's own evaluation, on a CPU.

    python tests/benchmarks/recall.py [--texts 25000] [--images 5000] [--large 10] [--threads 2] [--json]

Both get the same features (fp32, D = 512, ragged captions) and each runs in a process of its own, in turn: peak memory
is that of the process above what it held with the features in memory. CLIP_benchmark is installed beside the script's
cache by pip, without its dependencies, and its `evaluate` is given features in place of pixels; where it cannot be
installed the same definition is computed by a dense top-k, and the line says so. `--large 10` measures ours alone at
ten times the captions.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from process_memory import peak_bytes, watch_peak
from torch import Tensor

WIDTH = 512
KS = (1, 5, 10)
MIB = 1 << 20
PEER = "clip_benchmark==1.6.1"
_ROUNDING = 1e-6  # CLIP_benchmark's means are float32


class Measured(NamedTuple):
    """One run in a process of its own."""

    seconds: float
    above: float  # MiB of peak memory above what it held with the features
    peak: float  # MiB, of the process
    values: dict[str, float]


class Line(NamedTuple):
    name: str
    case: str
    ours: float
    peer: float | None
    ratio: float | None  # ours / peer
    unit: str


class Features(NamedTuple):
    image: Tensor  # (N,D)
    text: Tensor  # (M,D)
    owners: Tensor  # (M,)


def make_features(num_texts: int, num_images: int) -> Features:
    """Captions around their images, so that recall is neither 0 nor 1; 0 to 10 captions an image, at least one."""
    made = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(num_images, WIDTH, generator=made), dim=1)
    # CLIP_benchmark takes captions image by image and divides by zero for an image without one.
    extra = torch.randint(num_images, (num_texts - num_images,), generator=made)
    owners = torch.cat([torch.arange(num_images), extra]).sort().values
    text = image[owners] + 0.28 * torch.randn(num_texts, WIDTH, generator=made)
    return Features(image, F.normalize(text, dim=1), owners)


def ours(features: Features) -> dict[str, float]:
    from eval.metrics import retrieval_recall

    return retrieval_recall(features.image, features.text, features.owners, KS)


def clip_benchmark(features: Features) -> dict[str, float]:
    """CLIP_benchmark's `evaluate`: batches of 64, its default; features stand for pixels and for tokens."""
    from clip_benchmark.metrics import zeroshot_retrieval  # type: ignore[import-not-found]

    class Encoded:
        def encode_image(self, images: Tensor) -> Tensor:
            return images

        def encode_text(self, tokens: Tensor) -> Tensor:
            return tokens

    counts = features.owners.bincount(minlength=len(features.image)).tolist()
    rows = iter(range(len(features.text)))
    captions = [[next(rows) for _ in range(count)] for count in counts]
    batches = [
        (features.image[start : start + 64], captions[start : start + 64])
        for start in range(0, len(features.image), 64)
    ]
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (its progress bar)
    found = zeroshot_retrieval.evaluate(
        Encoded(), batches, lambda texts: features.text[texts], "cpu", amp=False, recall_k_list=list(KS)
    )
    sys.stderr = sys.__stderr__
    return _our_names(found)


def definition(features: Features) -> dict[str, float]:
    """The definition of CLIP_benchmark's numbers, computed densely."""
    scores = features.text @ features.image.T
    found = {}
    for k in KS:
        hit = (scores.topk(k, dim=1).indices == features.owners[:, None]).any(1)
        found[f"image_retrieval_recall@{k}"] = hit.float().mean().item()
        nearest = features.owners[scores.T.topk(k, dim=1).indices]
        own = torch.arange(len(features.image))[:, None]
        found[f"text_retrieval_recall@{k}"] = (nearest == own).any(1).float().mean().item()
    return _our_names(found)


RUNS: dict[str, Callable[[Features], dict[str, float]]] = {
    "ours": ours,
    "clip_benchmark": clip_benchmark,
    "definition": definition,
}


def run_alone(whose: str, num_texts: int, num_images: int, threads: int) -> None:
    """In a process of its own: seconds, memory and values as one JSON object."""
    torch.set_num_threads(threads)
    RUNS[whose](make_features(640, 130))  # what is loaded on first use
    features = make_features(num_texts, num_images)
    held = watch_peak()
    began = time.perf_counter()
    values = RUNS[whose](features)
    seconds = time.perf_counter() - began
    peak = peak_bytes()
    print(json.dumps({"seconds": seconds, "above": (peak - held) / MIB, "peak": peak / MIB, "values": values}))


def measure(whose: str, num_texts: int, num_images: int, threads: int, peer: Path | None) -> Measured:
    command = [sys.executable, __file__, "--alone", whose, str(num_texts), str(num_images), str(threads)]
    folders = [str(Path(__file__).parents[2])] + ([str(peer)] if peer else [])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def compare(num_texts: int, num_images: int, threads: int, repeats: int, peer: Path | None) -> Iterator[Line]:
    case = f"{num_texts} captions x {num_images} images"
    other = "clip_benchmark" if peer else "definition"
    runs: dict[str, list[Measured]] = {"ours": [], other: []}
    for _ in range(repeats):
        for whose, found in runs.items():
            found.append(measure(whose, num_texts, num_images, threads, peer))
    for name, key, unit in (
        ("recall@1/5/10, both directions", "seconds", "s"),
        ("peak memory above the features", "above", "MiB"),
        ("peak memory of the process", "peak", "MiB"),
    ):
        mine, theirs = (statistics.median(getattr(run, key) for run in found) for found in runs.values())
        yield Line(name, f"{case}, {other}", mine, theirs, mine / theirs, unit)
    yield from compare_values(case, num_texts, num_images, *(found[0].values for found in runs.values()))


def compare_values(
    case: str, num_texts: int, num_images: int, own: dict[str, float], others: dict[str, float]
) -> Iterator[Line]:
    """How many values differ, and by how many queries; and how many queries tie across rank K, which explains it.

    Raises:
        SystemExit: a value differs by more than its ties allow.
    """
    ties = ties_across(make_features(num_texts, num_images))
    queries = {key: num_texts if key.startswith("text_to_image") else num_images for key in others}
    apart = {key: abs(own[key] - others[key]) * queries[key] for key in others}  # in queries
    unexplained = {key: off for key, off in apart.items() if off > ties[key] + _ROUNDING * queries[key]}
    if unexplained:
        raise SystemExit(f"values differ by more queries than tie across rank K: {unexplained}, ties {ties}")
    differing = sum(off > _ROUNDING * queries[key] for key, off in apart.items())
    yield Line(f"values of {len(apart)} that differ", case, differing, 0.0, None, "")
    yield Line("queries by which they differ", case, sum(apart.values()) if differing else 0.0, 0.0, None, "")
    yield Line("ties across rank K, all K", f"{case}, float64", sum(ties.values()), None, None, "queries")


def ties_across(features: Features) -> dict[str, int]:
    """By name of a value: queries whose best right answer ties (1e-6) with wrong ones on both sides of rank K.

    From all scores in float64, and nothing of vlkit's.
    """
    image, text = features.image.double(), features.text.double()
    itself = torch.arange(len(features.image))
    found: dict[str, int] = {}
    for direction, queries, gallery, owner, owned in (
        ("text_to_image", text, image, features.owners, itself),
        ("image_to_text", image, text, itself, features.owners),
    ):
        for start in range(0, len(queries), 500):
            rows = slice(start, start + 500)
            scores = queries[rows] @ gallery.T
            right = owned[None] == owner[rows, None]
            best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
            wrong = scores.masked_fill(right, -torch.inf) - best
            above, beside = (wrong > 1e-6).sum(1), (wrong.abs() <= 1e-6).sum(1)
            for k in KS:
                across = (above < k) & (k <= above + beside)
                name = f"{direction}/recall@{k}"
                found[name] = found.get(name, 0) + int(across.sum())
    return found


def install_peer(folder: Path) -> Path | None:
    """CLIP_benchmark in a folder of its own; None where pip cannot have it."""
    if (folder / "clip_benchmark").is_dir():
        return folder
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PEER]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        print(f"{PEER} cannot be installed here; its definition is computed instead.", file=sys.stderr)
        return None
    return folder


def show(line: Line, as_json: bool) -> None:
    if as_json:
        print(json.dumps(line._asdict()), flush=True)
        return
    peer = "-" if line.peer is None else f"{line.peer:.3f}"
    ratio = "-" if line.ratio is None else f"{line.ratio:.3f}"
    print(f"{line.name:<32} {line.case:<52} {line.ours:>10.3f} {peer:>10} {ratio:>7} {line.unit}", flush=True)


def _our_names(found: dict[str, float]) -> dict[str, float]:
    """image_retrieval looks for images, from a text."""
    names = {"image_retrieval_": "text_to_image/", "text_retrieval_": "image_to_text/"}
    return {new + key.removeprefix(old): v for key, v in found.items() for old, new in names.items() if old in key}


def main() -> None:
    if sys.argv[1:2] == ["--alone"]:
        run_alone(sys.argv[2], *(int(number) for number in sys.argv[3:6]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=25_000)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--large", type=int, default=10, help="ours alone at this many times the captions; 0 for not")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peer", type=Path, help="folder to keep CLIP_benchmark in; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="one object a line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        peer = install_peer(arguments.peer or Path(temporary))
        for line in compare(arguments.texts, arguments.images, arguments.threads, arguments.repeats, peer):
            show(line, arguments.json)
    if arguments.large:
        texts = arguments.texts * arguments.large
        found = measure("ours", texts, arguments.images, arguments.threads, None)
        case = f"{texts} captions x {arguments.images} images"
        show(Line("recall@1/5/10, both directions", case, found.seconds, None, None, "s"), arguments.json)
        show(Line("peak memory above the features", case, found.above, None, None, "MiB"), arguments.json)


if __name__ == "__main__":
    main()
