"""What the loader hands over: across the border of epochs, without copies, with second views and labels."""

import gc
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlkit.data.augment import Augment, decode_changed, decode_views
from vlkit.data.decode import open_image
from vlkit.data.loader import Loader
from vlkit.data.randomness import generator
from vlkit.data.shard_index import ShardSet
from vlkit.data.shared_block import SharedBlock, Slots
from vlkit.data.transforms import Preprocess
from vlkit.models.tokenizers import CLIP_BPE, TextTokenizer

TOKENIZER = TextTokenizer(CLIP_BPE, 16)
AUGMENT = Augment(crop_scale=(0.3, 1.0), hflip=0.5)
COUNT = 23


def picture(number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def files_of(classes: dict[int, bytes]) -> Iterator[tuple[str, bytes]]:
    """A shard's, in which some samples have a class."""
    for number in range(COUNT):
        yield f"{number:06}.jpg", encoded(picture(number))
        yield f"{number:06}.txt", f"picture {number}".encode()
        if number in classes:
            yield f"{number:06}.cls", classes[number]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, write_tar: Callable[..., Path]) -> ShardSet:
    return ShardSet.open(write_tar(tmp_path_factory.mktemp("shards") / "00000.tar", files_of({0: b"7", 5: b"11"})))


def make(shards: ShardSet, **settings: Any) -> Loader:
    return Loader(shards, TOKENIZER, **{"batch_size": 4, "preprocess": Preprocess(size=16), **settings})


def waits_for(condition: Any, seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def test_the_next_epoch_is_read_while_this_one_ends(shards: ShardSet, assert_equal: Callable[..., None]) -> None:
    settings: dict[str, Any] = {"augment": AUGMENT, "second_view": AUGMENT, "labels": True}
    alone = make(shards, **settings)
    with make(shards, workers=1, prefetch=2, **settings) as loader:
        first = list(loader.epoch(0, start=3))
        feed = loader._running.feed
        assert feed is not None and waits_for(lambda: len(feed._ready) == 2)  # nobody has asked for epoch 1 yet
        second = list(loader.epoch(1))
        assert loader._running.feed is feed
        again = list(loader.epoch(1))  # not what comes next: a new feed
        assert loader._running.feed is not feed
        assert list(loader.epoch(1, start=loader.num_batches)) == []
        assert loader.report().num_samples == 4 * (len(first) + len(second) + len(again))
    assert_equal(first, list(alone.epoch(0, start=3)))
    assert_equal(second, list(alone.epoch(1)))
    assert_equal(again, second)


def test_a_loader_nobody_holds_ends_its_workers(shards: ShardSet, worker_pids: Callable[[], set[int]]) -> None:
    before = worker_pids()
    loader = make(shards, workers=1)
    list(loader.epoch(0))
    assert len(worker_pids() - before) == 1
    del loader
    gc.collect()
    assert waits_for(lambda: worker_pids() == before)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_that_are_kept_do_not_change(shards: ShardSet, num_workers: int) -> None:
    with make(shards, augment=AUGMENT, workers=num_workers) as loader:
        kept = [batch for epoch in range(2) for batch in loader.epoch(epoch)]
        copies = [batch.images.clone() for batch in kept]
        part = kept[1].images[2]  # a view holds the memory too
        del kept[1:4]
        for epoch in range(2, 4):
            for _ in loader.epoch(epoch):
                pass
        assert torch.equal(part, copies[1][2])
        for batch, copy in zip(kept, [copies[0], *copies[4:]], strict=True):
            assert torch.equal(batch.images, copy)


def test_slots_come_back_when_the_last_view_is_gone() -> None:
    slots = Slots(SharedBlock(12).tensor, 3)
    lent = slots.lend(slots.take())
    view = lent.view(2, 2)[1]
    taken = slots.take()
    slots.view(taken).fill_(7)
    assert slots.num_lent == 1 and not view.eq(7).any()
    del lent
    assert slots.num_lent == 1
    view.fill_(3)
    del view
    assert slots.num_lent == 0
    slots.give_back(taken)
    numbers = [slots.take() for _ in range(3)]
    assert sorted(numbers) == [0, 1, 2]
    assert slots.view(0).tolist() == [3 * (n > 1) for n in range(4)]
    with pytest.raises(IndexError):
        slots.take()


def test_the_second_view_has_its_own_random_numbers(shards: ShardSet) -> None:
    loader = make(shards, augment=AUGMENT, second_view=AUGMENT, shuffle=False)
    plain = make(shards, augment=AUGMENT, shuffle=False)
    for batch, alone in zip(loader.epoch(2), plain.epoch(2), strict=True):
        assert torch.equal(batch.images, alone.images) and alone.extra == {}
        assert batch.extra["second_view"].is_contiguous(memory_format=torch.channels_last)
        for row, number in enumerate(batch.ids.tolist()):
            image = open_image(encoded(picture(number)), where="x")
            draw = generator(0, 2, number, "second view")
            expected = decode_changed(image, AUGMENT.draw(image.height, image.width, draw), 16, "bicubic")
            assert torch.equal(batch.extra["second_view"][row], expected)
            assert not torch.equal(batch.images[row], expected)


def test_a_second_view_beside_the_plain_preprocessing(shards: ShardSet) -> None:
    batch = next(make(shards, second_view=AUGMENT).epoch(0))
    assert torch.equal(batch.images, next(make(shards).epoch(0)).images)
    assert batch.extra["second_view"].shape == batch.images.shape


def test_views_of_different_scale_share_no_decoding() -> None:
    image = open_image(encoded(picture(0, (300, 200))), where="x")
    views = [
        Augment((0.9, 1.0)).draw(image.height, image.width, generator(0, 0, 0, "a")),
        Augment((0.1, 0.1)).draw(image.height, image.width, generator(0, 0, 0, "b")),
    ]
    shrinks = [image.shrink_for(choices.box.height, choices.box.width, 32) for choices in views]
    assert shrinks == [2, 1]
    for choices, made in zip(views, decode_views(image, views, 32, "bicubic"), strict=True):
        assert torch.equal(made, decode_changed(image, choices, 32, "bicubic"))


def test_labels_are_class_numbers_or_minus_one(
    tmp_path: Path, shards: ShardSet, write_tar: Callable[..., Path]
) -> None:
    batches = list(make(shards, labels=True, shuffle=False, remainder="keep").epoch(0))
    labels = torch.cat([batch.extra["labels"] for batch in batches])
    assert labels.dtype == torch.int64 and len(labels) == 24
    assert labels.tolist() == [{0: 7, 5: 11}.get(number, -1) for number in range(24)]
    assert "labels" not in next(make(shards).epoch(0)).extra
    damaged = ShardSet.open(write_tar(tmp_path / "00000.tar", files_of({3: b"seven"})))
    loader = make(damaged, labels=True, shuffle=False, max_bad_fraction=1.0)
    assert next(loader.epoch(0)).valid.tolist() == [True, True, True, False]
    assert loader.report().causes == {"unreadable label": 1}
    assert next(make(damaged).epoch(0)).valid.all()  # who needs no labels is not stopped by one


def test_decoding_at_once_the_size_is_less_exact() -> None:
    image = open_image(encoded(picture(1, (200, 160))), where="x")
    choices = Augment(crop_scale=(1.0, 1.0)).draw(image.height, image.width, generator(0, 0, 0, "a"))
    full, once, twice = (
        decode_changed(image, choices._replace(dct_scale=scale), 64, "bicubic").float() for scale in (1000, 1, 2)
    )
    assert image.shrink_for(160, 200, 64, 1) == 2 and image.shrink_for(160, 200, 64, 2) == 1
    assert torch.equal(full, twice) and 0 < (full - once).abs().mean() < 3


def test_raw_samples_are_the_files_of_the_tar(shards: ShardSet) -> None:
    (shard,) = shards.shards
    samples = list(shard.raw_samples())
    assert [sample.key for sample in samples] == [shard.key(i) for i in range(COUNT)]
    assert [sample.image for sample in samples] == [shard.image_bytes(i) for i in range(COUNT)]
    assert [sample.caption for sample in samples] == [f"picture {n}".encode() for n in range(COUNT)]
