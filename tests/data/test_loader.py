"""Batches out of shards: exact, repeatable, the same with any number of workers, and honest about what is broken."""

import gc
import io
import json
import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlkit.contracts import ImageTextBatch
from vlkit.data.captions import caption_hash
from vlkit.data.loader import Loader
from vlkit.data.shard_index import ShardSet, write_index
from vlkit.data.transforms import Augment, Preprocess
from vlkit.data.worker_pool import WorkerPool
from vlkit.errors import ConfigError, DataError
from vlkit.models.tokenizers import CLIP_BPE, TextTokenizer

SIZES = (3, 17, 1, 24, 9, 2, 20, 7)  # 83 samples in 8 uneven shards
TOKENIZER = TextTokenizer(CLIP_BPE, 16)
AUGMENT = Augment(crop_scale=(0.3, 1.0), hflip=0.5)
Edit = Callable[[int, dict[str, bytes]], dict[str, bytes]]


def colour(number: int) -> tuple[int, int, int]:
    return (number * 3 % 256, (number * 7 + 40) % 256, 250 - number)


def captions(number: int) -> list[str]:
    """One, two or three captions, which name the sample."""
    return [f"picture {number} view {view}" for view in range(1 + number % 3)]


def sample(number: int) -> dict[str, bytes]:
    """A left half of the sample's own colour, a white right half."""
    image = Image.new("RGB", (36, 28 + number % 9), (255, 255, 255))
    image.paste(colour(number), (0, 0, 18, image.height))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"png": buffer.getvalue(), "txt": "\n".join(captions(number)).encode()}


def write_shards(folder: Path, sizes: Iterable[int] = SIZES, edit: Edit = lambda number, files: files) -> ShardSet:
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for _ in range(size):
                for suffix, content in edit(number, sample(number)).items():
                    member = tarfile.TarInfo(f"{number:06}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                number += 1
    return ShardSet.open(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("shards"))


def make(shards: ShardSet, **settings: Any) -> Loader:
    return Loader(shards, TOKENIZER, **{"batch_size": 10, "preprocess": Preprocess(size=16), **settings})


def assert_equal(ours: list[ImageTextBatch], theirs: list[ImageTextBatch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys == b.keys
        for name in ("images", "tokens", "text_to_image", "ids", "caption_hash", "valid"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def check_pairs(batch: ImageTextBatch, shards: ShardSet) -> None:
    """Image, key, number, text and hash of every row belong together."""
    for row, number in enumerate(batch.ids.tolist()):
        assert batch.keys[row] == shards.key(number) and batch.keys[row].endswith(f"/{number:06}")
        assert tuple(batch.images[row, :, 8, 1].tolist()) == colour(number)
        texts = (batch.text_to_image == row).nonzero().flatten().tolist()
        for text in texts:
            hashes = {caption_hash(caption): caption for caption in captions(number)}
            caption = hashes[int(batch.caption_hash[text])]
            expected = TOKENIZER([caption])[0]
            assert torch.equal(batch.tokens[text, : len(expected)], expected)
            assert not batch.tokens[text, len(expected) :].any()


def test_an_epoch_holds_each_sample_once_with_its_own_caption(shards: ShardSet) -> None:
    loader = make(shards, remainder="keep")
    batches = list(loader.epoch(0))
    assert len(batches) == loader.num_batches == 9
    for batch in batches[:-1]:
        assert batch.images.shape == (10, 3, 16, 16) and batch.images.dtype == torch.uint8
        assert batch.text_to_image.tolist() == list(range(10)) and batch.valid.all()
        check_pairs(batch, shards)
    ids = torch.cat([batch.ids for batch in batches])
    assert sorted(ids.tolist()) == [-1] * 7 + list(range(83))
    assert loader.report().num_samples == 83 and loader.report().num_broken == 0
    assert loader.report().lines() == []


def test_padding_rows_are_black_empty_and_not_valid(shards: ShardSet) -> None:
    *_, last = make(shards, remainder="keep").epoch(0)
    padding = last.ids == -1
    assert padding.tolist() == [False] * 3 + [True] * 7
    assert torch.equal(last.valid, ~padding)
    assert not last.images[padding].any() and last.images.shape[0] == 10
    assert last.keys[3:] == [""] * 7
    assert last.text_to_image.tolist() == list(range(10))
    assert torch.equal(last.tokens[3, :2], TOKENIZER([""])[0])


def test_order_and_pixels_depend_on_seed_and_epoch_only(shards: ShardSet) -> None:
    def ids(seed: int, epoch: int) -> list[int]:
        return torch.cat([batch.ids for batch in make(shards, seed=seed).epoch(epoch)]).tolist()

    assert ids(0, 0) == ids(0, 0)
    assert ids(0, 0) != ids(0, 1) != ids(1, 1)
    first, again = (list(make(shards, augment=AUGMENT).epoch(2)) for _ in range(2))
    assert_equal(first, again)
    other = list(make(shards, augment=AUGMENT, seed=1).epoch(2))
    by_id = [
        {int(i): image for batch in batches for i, image in zip(batch.ids, batch.images, strict=True)}
        for batches in (first, other)
    ]
    shared = by_id[0].keys() & by_id[1].keys()
    assert sum(not torch.equal(by_id[0][i], by_id[1][i]) for i in shared) > 0.9 * len(shared)


@pytest.fixture(scope="module")
def with_two_workers(shards: ShardSet) -> Iterator[Loader]:
    with make(shards, augment=AUGMENT, workers=2, captions_per_image=2, token_dropout=0.3) as loader:
        yield loader


def test_two_workers_give_the_batches_of_none(shards: ShardSet, with_two_workers: Loader) -> None:
    alone = make(shards, augment=AUGMENT, captions_per_image=2, token_dropout=0.3)
    for epoch in range(2):
        assert_equal(list(with_two_workers.epoch(epoch)), list(alone.epoch(epoch)))
    assert with_two_workers.report() == alone.report()


def test_one_worker_gives_the_batches_of_none(shards: ShardSet) -> None:
    with make(shards, augment=AUGMENT, workers=1, prefetch=1) as loader:
        assert_equal(list(loader.epoch(0)), list(make(shards, augment=AUGMENT).epoch(0)))


def test_resuming_gives_the_same_tail(shards: ShardSet, with_two_workers: Loader) -> None:
    settings = {"augment": AUGMENT, "captions_per_image": 2, "token_dropout": 0.3}
    whole = list(make(shards, **settings).epoch(3))
    for start in (0, 1, 5, 7, 8):
        assert_equal(list(make(shards, **settings).epoch(3, start)), whole[start:])
    assert_equal(list(with_two_workers.epoch(3, start=5)), whole[5:])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_give_the_batches_of_one(shards: ShardSet, world_size: int) -> None:
    alone = list(make(shards, augment=AUGMENT, batch_size=8).epoch(1))
    ranks = [
        list(make(shards, augment=AUGMENT, batch_size=8, rank=rank, world_size=world_size).epoch(1))
        for rank in range(world_size)
    ]
    for index, whole in enumerate(alone):
        parts = [batches[index] for batches in ranks]
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
        assert [key for part in parts for key in part.keys] == whole.keys


@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any), batch=st.integers(1, 5), data=st.data())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layout(
    sizes: list[int], batch: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    world_size = data.draw(st.integers(1, 3))
    shards = write_shards(tmp_path_factory.mktemp("layout"), sizes)
    loaders = [
        make(shards, batch_size=batch * world_size, rank=rank, world_size=world_size, remainder="keep", augment=None)
        for rank in range(world_size)
    ]
    batches = [one for loader in loaders for one in loader.epoch(1)]
    assert len({loader.num_batches for loader in loaders}) == 1
    ids = torch.cat([one.ids[one.valid] for one in batches]).tolist()
    assert sorted(ids) == list(range(sum(sizes)))


def test_several_captions_an_image_are_ragged(shards: ShardSet) -> None:
    for batch in make(shards, captions_per_image=2).epoch(0):
        counts = torch.bincount(batch.text_to_image, minlength=10).tolist()
        assert counts == [min(2, len(captions(number))) for number in batch.ids.tolist()]
        assert batch.tokens.shape[0] == batch.caption_hash.shape[0] == sum(counts)
        check_pairs(batch, shards)


def test_every_caption_is_used_over_the_epochs(shards: ShardSet) -> None:
    loader, seen = make(shards), set()
    for epoch in range(25):
        for batch in loader.epoch(epoch):
            seen.update(batch.caption_hash.tolist())
    expected = {caption_hash(caption) for number in range(83) for caption in captions(number)}
    assert seen == expected


def test_tokens_are_as_wide_as_the_longest_text(tmp_path: Path) -> None:
    texts = ["a", "a b c d", "word " * 40]

    def edit(number: int, files: dict[str, bytes]) -> dict[str, bytes]:
        return {**files, "txt": texts[number].encode()}

    shards = write_shards(tmp_path, [3], edit)
    loader = make(shards, batch_size=1, shuffle=False)
    assert [batch.tokens.shape[1] for batch in loader.epoch(0)] == [3, 6, 16]
    assert loader.report().num_full_texts == 1 and loader.report().num_texts == 3
    whole = Loader(shards, TextTokenizer(CLIP_BPE, 16, full_context=True), batch_size=1, preprocess=Preprocess(size=8))
    assert {batch.tokens.shape[1] for batch in whole.epoch(0)} == {16}


def test_token_ids_stored_in_the_shards_are_used(tmp_path: Path) -> None:
    write_shards(tmp_path, [4])
    stored = [[[1, 100 * number + view, 2] for view in range(len(captions(number)))] for number in range(4)]
    write_index(tmp_path / "00000.tar", {CLIP_BPE: stored})
    shards = ShardSet.open(tmp_path)
    (batch,) = make(shards, batch_size=4, captions_per_image=3, shuffle=False).epoch(0)
    assert batch.tokens.tolist() == [row for rows in stored for row in rows]


def test_tokens_of_another_tokenizer_are_not_used(tmp_path: Path) -> None:
    write_shards(tmp_path, [4])
    write_index(tmp_path / "00000.tar", {"hf:other": [[[7]] * len(captions(number)) for number in range(4)]})
    shards = ShardSet.open(tmp_path)
    (batch,) = make(shards, batch_size=4).epoch(0)
    check_pairs(batch, shards)


def test_a_plain_function_as_tokenizer(shards: ShardSet) -> None:
    padded = TextTokenizer(CLIP_BPE, 16, full_context=True)
    loader = Loader(shards, lambda texts: padded(texts), batch_size=10, preprocess=Preprocess(size=16))
    assert_equal(list(loader.epoch(0)), list(make(shards).epoch(0)))


def break_some(number: int, files: dict[str, bytes]) -> dict[str, bytes]:
    broken: dict[int, dict[str, bytes]] = {
        5: {"png": b"<html>not found</html>"},
        20: {"png": files["png"][:-30]},
        41: {"txt": b" \n"},
        42: {"png": b"", "txt": b""},
    }
    return {**files, **broken.get(number, {})}


def test_broken_samples_keep_their_row(tmp_path: Path, shards: ShardSet) -> None:
    """The others stay what and where they are; the report says how many, why and where."""
    damaged = write_shards(tmp_path, edit=break_some)
    loader = make(damaged, max_bad_fraction=0.2, remainder="keep", augment=AUGMENT)
    sound = make(shards, remainder="keep", augment=AUGMENT)
    lost = set()
    for ours, theirs in zip(loader.epoch(0), sound.epoch(0), strict=True):
        assert torch.equal(ours.ids, theirs.ids) and ours.images.shape == theirs.images.shape
        assert ours.text_to_image.tolist() == list(range(10))
        for row, number in enumerate(ours.ids.tolist()):
            if number in (5, 20, 41, 42):
                assert not ours.valid[row]
                assert number == 41 or not ours.images[row].any()
                lost.add(number)
            else:
                assert ours.valid[row] == theirs.valid[row]
                assert torch.equal(ours.images[row], theirs.images[row])
                assert ours.caption_hash[row] == theirs.caption_hash[row]
    report = loader.report()
    assert lost == {5, 20, 41, 42}
    assert report.causes == {"not an image": 1, "truncated": 1, "no caption": 2}
    assert (report.num_samples, report.num_broken) == (83, 4)
    assert any(line.startswith("00001.tar: 1 x not an image: 00001/000005") for line in report.lines())


def test_too_many_broken_samples_stop_the_epoch(tmp_path: Path) -> None:
    def edit(number: int, files: dict[str, bytes]) -> dict[str, bytes]:
        return {**files, "png": b"rubbish"} if 45 <= number < 54 else files

    damaged = write_shards(tmp_path, edit=edit)
    with pytest.raises(DataError) as caught:
        list(make(damaged, max_bad_fraction=0.05).epoch(0))
    message = str(caught.value)
    assert "samples could not be read (" in message and "x not an image)" in message
    assert "more than max_bad_fraction = 0.05 allows. Worst: 00004.tar: " in message
    assert "00004/00004" in message and "vlkit shards validate" in message
    with make(damaged, max_bad_fraction=0.05, workers=1) as loader, pytest.raises(DataError) as in_worker:
        list(loader.epoch(0))
    assert str(in_worker.value) == message
    list(make(damaged, max_bad_fraction=0.2).epoch(0))


def test_no_broken_sample_is_allowed_with_a_fraction_of_zero(tmp_path: Path) -> None:
    damaged = write_shards(tmp_path, [5], lambda number, files: {**files, "png": b"x"} if number == 3 else files)
    with pytest.raises(DataError, match=r"1 of \d samples could not be read"):
        list(make(damaged, batch_size=1, max_bad_fraction=0.0).epoch(0))


def worker_pids() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid and "vlkit-data" in child.name}


def test_a_killed_worker_is_an_error_and_not_a_hang(shards: ShardSet) -> None:
    before = worker_pids()
    with make(shards, workers=2, batch_size=4, prefetch=1) as loader:
        batches = loader.epoch(0)
        next(batches)
        victim = min(worker_pids() - before)
        os.kill(victim, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(DataError, match=rf"Data worker \d \(process {victim}\) was killed by signal 9.*memory"):
            list(batches)
        assert time.monotonic() - started < 20
        assert worker_pids() == before  # the other one was ended
        assert len(list(loader.epoch(0))) == 20  # and the loader can be used again


def test_an_exception_in_a_worker_comes_with_its_traceback() -> None:
    pool = WorkerPool(operator.truediv, 1, 8)  # (task, memory) -> task / memory
    try:
        pool.submit("mine", 0)
        ((tag, result),) = pool.wait()
        assert tag == "mine" and result.shape == (8,)
        pool.submit("mine", "text")
        with pytest.raises(RuntimeError, match=r"Data worker 0 failed:(.|\n)*TypeError: unsupported operand"):
            pool.wait()
    finally:
        pool.close()


def test_leaving_an_epoch_early_and_closing_twice(shards: ShardSet) -> None:
    before = worker_pids()
    loader = make(shards, workers=1)
    for _ in range(3):
        for batch in loader.epoch(0):
            assert batch.valid.all()
            break
        gc.collect()
    suspended = loader.epoch(1)
    next(suspended)
    time.sleep(0.3)  # further batches are ready by now; they must not be given out after `close`
    with pytest.raises(ConfigError, match="Two epochs of one loader"):
        next(loader.epoch(2))
    loader.close()
    loader.close()
    assert worker_pids() == before
    with pytest.raises(ConfigError, match="was closed before the epoch"):
        list(suspended)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"workers": -1}, r"workers is -1; expected at least 0"),
        ({"captions_per_image": 0}, r"captions_per_image is 0"),
        ({"max_bad_fraction": 2.0}, r"max_bad_fraction is 2.0; a fraction lies in \[0, 1\]"),
        ({"batch_size": 9, "world_size": 2}, r"9, which does not split evenly over 2"),
    ],
)
def test_settings_that_make_no_sense(shards: ShardSet, settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(shards, **settings_)


def test_image_size_replaces_that_of_the_preprocessing(shards: ShardSet) -> None:
    assert next(iter(make(shards, image_size=24).epoch(0))).images.shape == (10, 3, 24, 24)


SCRIPT = """
    import json, multiprocessing, signal, sys, time
    from vlkit.data.loader import Loader
    from vlkit.data.shard_index import ShardSet
    from vlkit.data.transforms import Preprocess
    from vlkit.models.tokenizers import CLIP_BPE, TextTokenizer

    if __name__ == "__main__":
        # A job that a shell started in the background inherits a Ctrl-C that is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        loader = Loader(ShardSet.open(sys.argv[1]), TextTokenizer(CLIP_BPE, 16), batch_size=4,
                        preprocess=Preprocess(size=16), workers=2, start_method=sys.argv[2])
        batches = loader.epoch(0)
        next(batches)
        try:
            print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            raise SystemExit(3)
"""


@pytest.mark.parametrize(
    ("how", "method"),
    [
        (signal.SIGINT, "fork"),
        pytest.param(signal.SIGINT, "forkserver", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "fork", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "forkserver", marks=pytest.mark.slow),
    ],
)
def test_workers_leave_with_the_main_process(
    shards: ShardSet, tmp_path: Path, how: signal.Signals, method: str
) -> None:
    """After Ctrl-C (sent to the whole group, as a terminal does) and after a kill of the main process alone."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen(
        [sys.executable, str(script), str(shards.shards[0].path.parent), method],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())
    assert len(pids) == 2
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.kill()
    out, errors = process.communicate(timeout=30)
    if how == signal.SIGINT:
        assert process.returncode == 3 and "interrupted" in out and "Traceback" not in errors, errors
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().split()[2] == "Z")  # a zombie has ended


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_other_start_methods(shards: ShardSet, method: Any) -> None:
    with make(shards, augment=AUGMENT, workers=2, start_method=method) as loader:
        assert_equal(list(loader.epoch(0)), list(make(shards, augment=AUGMENT).epoch(0)))


@pytest.mark.slow
def test_memory_stays_flat_over_epochs(shards: ShardSet) -> None:
    def kilobytes() -> int:
        pids = [os.getpid(), *worker_pids()]
        return sum(
            int(line.split()[1])
            for pid in pids
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("VmRSS")
        )

    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc on this system")
    with make(shards, augment=AUGMENT, workers=2) as loader:
        used = []
        for epoch in range(50):
            for _ in loader.epoch(epoch):
                pass
            used.append(kilobytes())
    assert used[-1] - used[9] < 5_000, np.array(used)


@pytest.mark.gpu
def test_images_are_pinned_where_there_is_a_gpu(shards: ShardSet) -> None:
    with make(shards, workers=1) as loader:
        assert all(batch.images.is_pinned() for batch in loader.epoch(0))
    assert next(iter(make(shards).epoch(0))).images.is_pinned()
