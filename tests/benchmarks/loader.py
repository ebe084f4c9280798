"""The loader beside open_clip's: images per CPU-second, raw reading, the decoder's limit, first batch, memory.

    VLKIT_DATA=... python tests/benchmarks/loader.py [--cases 341x256,640x480,1024x768] [--images 1024] [--json]

Photographs of `coco_small` are cut to each size, stored at JPEG quality 90 and packed into tars that both sides read.
Ours and the peer run in turn, pass after pass, each in a process of its own with one worker and one torch thread; the
peer is open_clip_torch[training] 3.3.0 in an environment which this script makes in vlkit's cache folder and keeps.

    loader         images a CPU-second over the whole process tree, children that have ended included: shards to
                   batches of 64 images of 224 pixels (random crop of 90-100% of the area, bicubic) and tokens,
                   measured between two batches of a run that has warmed up
    decode_limit   the same of ours, beside simplejpeg's full decode + torchvision v2's uint8 bicubic antialias to
                   224x224 of the same bytes in one thread; and beside the bare decode
    raw_iteration  samples a CPU-second in the tars' order: key, encoded image and caption, nothing decoded; ours as
                   it hands images out (views of the mapped file), with every image copied to bytes as the peer does,
                   and with the index made anew in each pass
    first_batch    seconds from opening the shards to the first batch, a worker's start included, imports not
    memory         MiB of the whole process tree (shared pages counted once) after the measured batches

Ours reads token ids from the sidecar; what making them cost once is printed. The peer runs its own loader as its README
starts it: webdataset shards and its default augmentation, which is the one above.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

PEER = ("open_clip_torch[training]==3.3.0", "webdataset<=0.2.86")
SIZE, BATCH, SHARDS, WARM_UP = 224, 64, 4, 4
RAW_ROUNDS = 8
Figures = dict[str, float]


class Line(NamedTuple):
    name: str
    case: str
    ours: float
    peer: float
    ratio: float  # ours / peer
    unit: str


def cpu_seconds(pid: int | None = None) -> float:
    """CPU time of a process and everything below it, with the children that have ended and were waited for."""
    pid = pid or os.getpid()
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:  # it ends just now, and is in its parent's sum then
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(map(cpu_seconds, children(pid)))


def children(pid: int) -> list[int]:
    listed: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        listed += map(int, task.read_text().split())
    return listed


def mebibytes(pid: int | None = None) -> float:
    """Memory of a process and everything below it; a page that several share counts in parts."""
    pid = pid or os.getpid()
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    own = next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    return own + sum(map(mebibytes, children(pid)))


def timed_batches(open_batches: Callable[[], Iterator[int]], images: int) -> Figures:
    """Figures of a stream of batches (each given as its number of images)."""
    began = time.perf_counter()
    batches = open_batches()
    next(batches)
    first = time.perf_counter() - began
    for _ in range(WARM_UP - 1):
        next(batches)
    used, seen = cpu_seconds(), 0
    while seen < images:
        seen += next(batches)
    used = cpu_seconds() - used
    return {"speed": seen / used, "first": first, "memory": mebibytes()}


def our_loader(shards: Path, images: int) -> Figures:
    from vlkit.data.loader import Loader
    from vlkit.data.shard_index import ShardSet
    from vlkit.data.transforms import Augment, Preprocess
    from vlkit.models.tokenizers import CLIP_BPE, TextTokenizer

    tokenizer = TextTokenizer(CLIP_BPE, 77)
    opened: list[Loader] = []

    def batches() -> Iterator[int]:
        loader = Loader(
            ShardSet.open(shards),
            tokenizer,
            batch_size=BATCH,
            preprocess=Preprocess(size=SIZE),
            augment=Augment(crop_scale=(0.9, 1.0)),
            workers=1,
        )
        opened.append(loader)
        for epoch in range(1_000_000):
            for batch in loader.epoch(epoch):
                assert batch.images.shape == (BATCH, 3, SIZE, SIZE) and bool(batch.valid.all())
                yield len(batch.tokens)

    figures = timed_batches(batches, images)
    opened[0].close()
    return figures


def their_loader(shards: Path, images: int) -> Figures:
    import open_clip
    from open_clip_train.data import get_wds_dataset
    from open_clip_train.params import parse_args

    tars = f"{shards}/{{00000..{SHARDS - 1:05}}}.tar"
    # More samples than are asked for: it reads the shards over and over until the end of this one epoch.
    samples, settings = str(images * 4 + 10_000), f"--dataset-type webdataset --batch-size {BATCH} --workers 1"
    args = parse_args(["--train-data", tars, "--train-num-samples", samples, *settings.split()])
    args.world_size, args.rank = 1, 0
    transform = open_clip.image_transform(SIZE, is_train=True, aug_cfg={"scale": (0.9, 1.0)})
    tokenizer = open_clip.get_tokenizer("ViT-B-32")

    def batches() -> Iterator[int]:
        loader = get_wds_dataset(args, transform, is_train=True, tokenizer=tokenizer).dataloader
        for pixels, tokens in loader:
            assert pixels.shape == (BATCH, 3, SIZE, SIZE)
            yield len(tokens)

    return timed_batches(batches, images)


def limit(shards: Path, images: int) -> Figures:
    """simplejpeg and torchvision on the bytes alone, read before."""
    import simplejpeg
    import torch
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as change

    def resized(data: bytes) -> None:
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
        change.resize(pixels, [SIZE, SIZE], InterpolationMode.BICUBIC, antialias=True)

    encoded: list[bytes] = []
    with tarfile.open(shards / "00000.tar") as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                file = tar.extractfile(member)
                assert file is not None
                encoded.append(file.read())

    def bare(data: bytes) -> None:
        simplejpeg.decode_jpeg(data, "RGB")

    speeds: list[float] = []
    for work in (resized, bare):
        for data in encoded[:BATCH]:
            work(data)
        rounds = max(images // len(encoded), 1)
        used = time.process_time()
        for data in encoded * rounds:
            work(data)
        speeds.append(len(encoded) * rounds / (time.process_time() - used))
    return {"speed": speeds[0], "bare": speeds[1]}


def raw_speed(read: Callable[[], int]) -> float:
    read()  # the files are in memory then
    used, seen = time.process_time(), 0
    for _ in range(RAW_ROUNDS):
        seen += read()
    return seen / (time.process_time() - used)


def our_raw(shards: Path, images: int) -> Figures:
    from vlkit.data.shard_index import ShardSet, sidecar_path, write_index

    opened = ShardSet.open(shards)

    def read(copied: bool, indexed: bool = True) -> int:
        seen, read_from = 0, opened
        if not indexed:
            for tar in sorted(shards.glob("*.tar")):
                sidecar_path(tar).unlink(missing_ok=True)
            read_from = ShardSet.open(shards)
        for shard in read_from.shards:
            for sample in shard.raw_samples():
                image = bytes(sample.image) if copied else sample.image
                seen += bool(image and sample.caption and sample.key)
        return seen

    figures = {
        "speed": raw_speed(lambda: read(copied=False)),
        "copied": raw_speed(lambda: read(copied=True)),
        "fresh": raw_speed(lambda: read(copied=False, indexed=False)),
    }
    for tar in sorted(shards.glob("*.tar")):
        write_index(tar)
    return figures


def their_raw(shards: Path, images: int) -> Figures:
    import webdataset

    tars = [str(tar) for tar in sorted(shards.glob("*.tar"))]

    def read() -> int:
        samples = webdataset.WebDataset(tars, shardshuffle=False)
        return sum(bool(sample["jpg"] and sample["txt"] and sample["__key__"]) for sample in samples)

    return {"speed": raw_speed(read)}


ROLES = {one.__name__: one for one in (our_loader, their_loader, limit, our_raw, their_raw)}


def run_role(python: str, role: str, shards: Path, images: int) -> Figures:
    command = [python, __file__, "--role", role, "--shards", str(shards), "--images", str(images)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{role} failed:\n{done.stderr[-3000:]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def peer_python(say: Callable[[str], None]) -> str:
    """The interpreter of the peer's environment, made when it is not there; with the torch and pillow of ours."""
    from vlkit.data.cache_folder import cache_folder

    same = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "torchvision", "pillow")]
    wanted = [*PEER, *same]
    folder = cache_folder() / "benchmarks" / "open_clip-3.3.0"
    python, finished = folder / "bin" / "python", folder / "installed.txt"
    if not finished.exists() or finished.read_text() != "\n".join(wanted):
        say(f"Installing {' '.join(wanted)} into {folder} (once)")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        # uv where there is one (`make env` brings it): a minute where pip takes five.
        quick = [sys.executable, "-m", "uv", "pip", "install", "--python", str(python)]
        install = quick if find_spec("uv") else [str(python), "-m", "pip", "install"]
        subprocess.run([*install, "--quiet", *wanted], check=True)
        finished.write_text("\n".join(wanted))
    return str(python)


def encode(case: str, photographs: list[Path]) -> list[bytes]:
    """JPEG files of a case's size: the middle of each photograph, as large as its shape allows, scaled."""
    from PIL import Image, ImageOps

    width, height = map(int, case.split("x"))
    files = []
    for path in photographs:
        buffer = io.BytesIO()
        fitted = ImageOps.fit(Image.open(path).convert("RGB"), (width, height), Image.Resampling.BICUBIC)
        fitted.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def write_shards(folder: Path, files: list[bytes], captions: list[str]) -> None:
    """Every shard holds every photograph once, under keys of its own; one caption an image."""
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for number, (image, caption) in enumerate(zip(files, captions, strict=True)):
                for suffix, content in (("jpg", image), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{shard * len(files) + number:06}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def write_token_ids(folder: Path, captions: list[str]) -> float:
    """Store token ids in the sidecars; CPU-seconds it took, index and all."""
    from vlkit.data.shard_index import write_index
    from vlkit.models.tokenizers import CLIP_BPE, TextTokenizer

    tokenizer = TextTokenizer(CLIP_BPE, 77)
    tokenizer.encode_ragged(["a first text loads the vocabulary"])
    began = time.process_time()
    for tar in sorted(folder.glob("*.tar")):
        write_index(tar, {tokenizer.tokenizer_id: [[ids] for ids in tokenizer.encode_ragged(captions)]})
    return time.process_time() - began


def photographs_and_captions(data: Path) -> tuple[list[Path], list[str]]:
    listed = json.loads((data / "annotations" / "captions_val2017.json").read_text(encoding="utf-8"))
    caption_of = {entry["image_id"]: " ".join(entry["caption"].split()) for entry in listed["annotations"]}
    found = [image for image in listed["images"] if (data / "val2017" / image["file_name"]).exists()]
    return [data / "val2017" / image["file_name"] for image in found], [caption_of[image["id"]] for image in found]


def average(passes: list[Figures], name: str) -> float:
    """Of speeds the harmonic mean: all images over all time."""
    values = [figures[name] for figures in passes]
    return statistics.median(values) if name in {"first", "memory"} else statistics.harmonic_mean(values)


def measure(case: str, folder: Path, peer: str, images: int, passes: int) -> Iterator[Line]:
    runs: dict[str, list[Figures]] = {}
    for _ in range(passes):
        for role in ("our_loader", "their_loader", "limit"):
            runs.setdefault(role, []).append(
                run_role(peer if role == "their_loader" else sys.executable, role, folder, images)
            )

    def line(name: str, unit: str, mine: str, other: str, figure: str = "speed", label: str = case) -> Line:
        ours, theirs = average(runs["our_loader"], mine), average(runs[other], figure)
        return Line(name, label, ours, theirs, ours / theirs, unit)

    speed = "images/CPU-s"
    yield line("loader", speed, "speed", "their_loader")
    yield line("decode_limit", speed, "speed", "limit", label=f"{case} decode + resize")
    yield line("decode_limit", speed, "speed", "limit", "bare", f"{case} bare decode")
    yield line("first_batch", "s", "first", "their_loader", "first")
    yield line("memory", "MiB", "memory", "their_loader", "memory")


def measure_raw(case: str, folder: Path, peer: str, passes: int) -> Iterator[Line]:
    mine, theirs = [], []
    for _ in range(passes):
        mine.append(run_role(sys.executable, "our_raw", folder, 0))
        theirs.append(run_role(peer, "their_raw", folder, 0))
    other = average(theirs, "speed")
    for label, figure in (("views", "speed"), ("copied", "copied"), ("views, new index", "fresh")):
        ours = average(mine, figure)
        yield Line("raw_iteration", f"{case} {label}", ours, other, ours / other, "samples/CPU-s")


def show(line: Line, as_json: bool) -> None:
    if as_json:
        print(json.dumps(line._asdict()), flush=True)
    else:
        cells: list[Any] = [line.name, line.case, f"{line.ours:.2f}", f"{line.peer:.2f}", f"{line.ratio:.2f}"]
        print("{:<14} {:<26} {:>11} {:>11} {:>7} {}".format(*cells, line.unit), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="341x256,640x480,1024x768", help="sizes, width x height")
    parser.add_argument("--images", type=int, default=1024, help="images a pass, after the warm-up")
    parser.add_argument("--passes", type=int, default=2, help="times each side runs")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        import torch

        torch.set_num_threads(1)
        print(json.dumps(ROLES[args.role](args.shards, args.images)))
        return
    data = Path(os.environ.get("VLKIT_DATA", "")) / "coco_small"
    if not os.environ.get("VLKIT_DATA") or not data.is_dir():
        print("skipped: it needs the photographs of coco_small; set VLKIT_DATA to the folder that holds it")
        return
    if not Path("/proc/self/stat").exists():
        print("skipped: CPU time and memory are read from /proc, which this system lacks")
        return
    with tempfile.TemporaryDirectory() as folder:
        run_cases(args, data, Path(folder))


def run_cases(args: argparse.Namespace, data: Path, work: Path) -> None:
    def say(text: str) -> None:
        print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    peer = peer_python(say)
    photographs, captions = photographs_and_captions(data)
    for case in args.cases.split(","):
        folder = work / case
        files = encode(case, photographs)
        write_shards(folder, files, captions)
        seconds = write_token_ids(folder, captions)
        say(
            f"{case}: {SHARDS} shards of {len(files)} photographs, {sum(map(len, files)) / len(files) / 1000:.0f} kB "
            f"each; index and token ids of {SHARDS * len(files)} captions took {seconds:.3f} CPU-s, once"
        )
        if not args.json:
            print(f"{'':<14} {'case':<26} {'ours':>11} {'peer':>11} {'ratio':>7}")
        lines = (measure(case, folder, peer, args.images, args.passes), measure_raw(case, folder, peer, args.passes))
        for line in chain.from_iterable(lines):
            show(line, args.json)


if __name__ == "__main__":
    main()
