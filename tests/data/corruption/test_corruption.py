"""Randomly damaged tars and images: nothing crashes or hangs, no image meets another's caption, counts add up.

Not among the damages: whole aligned blocks put in the place of others. No reader can see that in a tar; the check sum
in the stats file does (`test_validate.py`).
"""

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.fix_shards import LEFT_OUT, fix_shards
from data_tools.validate import validate_shards
from vlkit.data.decode import decode_image
from vlkit.data.loader import Loader
from vlkit.data.shard_index import ShardIndex, ShardSet
from vlkit.data.sources import read_source
from vlkit.data.transforms import Preprocess
from vlkit.errors import DataError

SECONDS_PER_CASE = 60


class Letters:
    """Texts to their bytes, so that a batch still tells which caption it holds."""

    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = [list(text.encode()[:60]) for text in texts]
        out = torch.zeros(len(rows), 64, dtype=torch.int64)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.tensor(row)
        return out

    @staticmethod
    def read(tokens: torch.Tensor) -> str:
        return bytes(value for value in tokens.tolist() if 0 < value < 256).decode("utf-8", "replace")


@contextmanager
def watchdog(case: int) -> Iterator[None]:
    def bark(*_: object) -> None:
        raise TimeoutError(f"case {case} took more than {SECONDS_PER_CASE} s")

    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(SECONDS_PER_CASE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def openable(folder: Path) -> list[Path]:
    """The tars that can be opened; a tar refused must say why."""
    good = []
    for path in sorted(folder.glob("*.tar")):
        try:
            ShardIndex.open(path)
        except DataError as error:
            assert path.name in str(error)
        else:
            good.append(path)
    return good


def check_loader(shards: ShardSet, numbered: Any, workers: int = 0) -> dict[int, int]:
    """Whole pairs by shard."""
    preprocess = Preprocess(size=numbered.side, resize_mode="squash")
    whole: dict[int, int] = {}
    rows = invalid = 0
    seen: list[str] = []
    settings = {"batch_size": 4, "remainder": "keep", "max_bad_fraction": 1, "captions_per_image": 1}
    with Loader(shards, Letters(), preprocess=preprocess, workers=workers, **settings) as loader:
        for batch in loader.epoch(0):
            assert batch.text_to_image.tolist() == list(range(len(batch.ids)))
            for row in range(len(batch.ids)):
                if batch.keys[row] == "":
                    assert not batch.valid[row]
                    continue
                rows += 1
                seen.append(batch.keys[row])
                if not batch.valid[row]:
                    invalid += 1
                    continue
                shard = int(batch.keys[row].partition("/")[0])
                whole[shard] = whole.get(shard, 0) + numbered.check_pair(
                    batch.images[row], Letters.read(batch.tokens[row]), shard
                )
        report = loader.report()
    assert rows == report.num_samples == shards.num_samples and len(set(seen)) == rows
    assert invalid == report.num_broken == sum(report.causes.values())
    assert report.num_broken == sum(problems.total for problems in report.shards.values())
    return whole


def check_source(names: list[Path], shards: ShardSet, numbered: Any) -> None:
    source = read_source("::".join(map(str, names)), format="webdataset")
    unread = source.problems.counts["label or captions that cannot be read"]
    assert len(source) + unread == shards.num_samples
    for record in source:
        try:
            pixels = decode_image(record.image.read(), where=record.key)
        except DataError:
            continue
        for text in record.captions:
            numbered.check_pair(pixels, text, int(record.key.partition("/")[0]))


def check_case(outcome: Any, folder: Path, numbered: Any, workers: int = 0) -> None:
    """Whatever reads the shards of a case finds every sample that was left whole, and no wrong pair."""
    names = openable(folder)
    report = validate_shards(folder)
    assert report.num_shards == numbered.shards
    assert report.problems.total > 0 or report.num_samples <= numbered.samples
    undecoded = sum(n for cause, n in report.problems.counts.items() if cause.startswith("image that does not decode"))
    assert report.num_decoded + undecoded + report.problems.counts["sample that cannot be read"] == report.num_samples
    untouched = set(range(numbered.shards)) - outcome.touched
    if not names:
        assert not untouched
        return
    try:
        shards = ShardSet.open(names)
    except DataError as error:
        assert "No usable sample" in str(error) and not untouched
        return
    assert shards.num_samples == report.num_samples
    whole = check_loader(shards, numbered, workers)
    assert all(whole.get(shard) == numbered.rows for shard in untouched), (whole, untouched)
    if outcome.only_images:
        assert shards.num_samples == numbered.samples
    check_source(names, shards, numbered)


@pytest.mark.parametrize("part", range(6))
def test_damage_costs_samples_and_nothing_else(part, tmp_path, damage, numbered):
    for case in range(part * 10, part * 10 + 10):
        with watchdog(case):
            check_case(damage(case, tmp_path / str(case)), tmp_path / str(case), numbered)


@pytest.mark.slow
def test_two_thousand_damages(tmp_path, damage, harms, numbered):
    seen: set[str] = set()
    for case in range(2000):
        with watchdog(case):
            outcome = damage(case, tmp_path / str(case))
            check_case(outcome, tmp_path / str(case), numbered, workers=2 if case % 400 == 7 else 0)
        seen.update(name.partition(" ")[2] for name in outcome.damages)
    assert seen == harms
    # 80 MB hidden in a picture's comment must not be unpacked a hundred times over.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1_500_000, "kB"


@pytest.mark.parametrize("case", [3, 11, 24])
def test_a_fixed_copy_is_whole(case, tmp_path, damage):
    folder, out = tmp_path / "shards", tmp_path / "clean"
    damage(case, folder)
    report = validate_shards(folder)
    fixed = fix_shards(report, out)
    again = validate_shards(out)
    assert again.ok, again.lines()
    assert again.num_samples == fixed.copied.num_samples > 0
    lines = [json.loads(line) for line in (out / LEFT_OUT).read_text().splitlines()]
    assert len(lines) == fixed.left_out.total and all(line["cause"] for line in lines)


def test_the_patterns_and_captions_tell_their_number(numbered):
    for number, data in enumerate(numbered.pictures):
        pixels, text = decode_image(data, where=""), numbered.caption(number)
        assert numbered.in_pixels(pixels) == number == numbered.in_text(text)
    assert numbered.in_text(numbered.caption(3).replace("3", "4", 1)) is None
    one = decode_image(numbered.pictures[1], where="")
    assert numbered.check_pair(one, numbered.caption(1), 0)
    with pytest.raises(AssertionError, match="the image of 1 with the caption of 2"):
        numbered.check_pair(one, numbered.caption(2), 0)


def test_brackets_nested_by_the_thousand_and_labels_beyond_all_classes(tmp_path, write_tar, numbered):
    """What a run of this file found: the first went past the loader as RecursionError, the second filled the memory."""
    files = [("a.png", numbered.pictures[1]), ("a.json", b"[" * 100_000), ("a.cls", b"9" * 12)]
    shard = ShardIndex.open(write_tar(tmp_path / "0.tar", files))
    with pytest.raises(DataError, match="bad JSON"):
        shard.captions(0)
    with pytest.raises(DataError, match="expected a class number"):
        shard.label(0)
    with pytest.raises(DataError, match="No usable sample"):
        read_source(tmp_path / "0.tar", format="webdataset")
