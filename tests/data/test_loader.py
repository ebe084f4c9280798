"""Batches out of shards: exact, repeatable, the same with any number of workers, and honest about what is broken."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlkit.data.captions import caption_hash
from vlkit.data.loader import Loader
from vlkit.data.shard_index import ShardSet, write_index
from vlkit.data.transforms import Augment, Preprocess
from vlkit.errors import ConfigError, DataError
from vlkit.models.tokenizers import CLIP_BPE, TextTokenizer

TOKENIZER = TextTokenizer(CLIP_BPE, 16)
AUGMENT = Augment(crop_scale=(0.3, 1.0), hflip=0.5)


def test_an_epoch_holds_each_sample_once_with_its_own_caption(
    shards: ShardSet, coloured: Any, make_loader: Callable[..., Loader]
) -> None:
    loader = make_loader(shards, remainder="keep")
    batches = list(loader.epoch(0))
    assert len(batches) == loader.num_batches == 9
    for batch in batches[:-1]:
        assert batch.images.shape == (10, 3, 16, 16) and batch.images.dtype == torch.uint8
        assert batch.text_to_image.tolist() == list(range(10)) and batch.valid.all()
        coloured.check_pairs(batch, shards)
    ids = torch.cat([batch.ids for batch in batches])
    assert sorted(ids.tolist()) == [-1] * 7 + list(range(83))
    assert loader.report().num_samples == 83 and loader.report().num_broken == 0
    assert loader.report().lines() == []


def test_padding_rows_are_black_empty_and_not_valid(shards: ShardSet, make_loader: Callable[..., Loader]) -> None:
    *_, last = make_loader(shards, remainder="keep").epoch(0)
    padding = last.ids == -1
    assert padding.tolist() == [False] * 3 + [True] * 7
    assert torch.equal(last.valid, ~padding)
    assert not last.images[padding].any() and last.images.shape[0] == 10
    assert last.keys[3:] == [""] * 7
    assert last.text_to_image.tolist() == list(range(10))
    assert torch.equal(last.tokens[3, :2], TOKENIZER([""])[0])


def test_order_and_pixels_depend_on_seed_and_epoch_only(
    shards: ShardSet, make_loader: Callable[..., Loader], assert_equal: Callable[..., None]
) -> None:
    def ids(seed: int, epoch: int) -> list[int]:
        return torch.cat([batch.ids for batch in make_loader(shards, seed=seed).epoch(epoch)]).tolist()

    assert ids(0, 0) == ids(0, 0)
    assert ids(0, 0) != ids(0, 1) != ids(1, 1)
    first, again = (list(make_loader(shards, augment=AUGMENT).epoch(2)) for _ in range(2))
    assert_equal(first, again)
    other = list(make_loader(shards, augment=AUGMENT, seed=1).epoch(2))
    by_id = [
        {int(i): image for batch in batches for i, image in zip(batch.ids, batch.images, strict=True)}
        for batches in (first, other)
    ]
    shared = by_id[0].keys() & by_id[1].keys()
    assert sum(not torch.equal(by_id[0][i], by_id[1][i]) for i in shared) > 0.9 * len(shared)


@pytest.fixture(scope="module")
def with_two_workers(shards: ShardSet, make_loader: Callable[..., Loader]) -> Iterator[Loader]:
    with make_loader(shards, augment=AUGMENT, workers=2, captions_per_image=2, token_dropout=0.3) as loader:
        yield loader


def test_two_workers_give_the_batches_of_none(
    shards: ShardSet, with_two_workers: Loader, make_loader: Callable[..., Loader], assert_equal: Callable[..., None]
) -> None:
    alone = make_loader(shards, augment=AUGMENT, captions_per_image=2, token_dropout=0.3)
    for epoch in range(2):
        assert_equal(list(with_two_workers.epoch(epoch)), list(alone.epoch(epoch)))
    assert with_two_workers.report() == alone.report()


def test_one_worker_gives_the_batches_of_none(
    shards: ShardSet, make_loader: Callable[..., Loader], assert_equal: Callable[..., None]
) -> None:
    with make_loader(shards, augment=AUGMENT, workers=1, prefetch=1) as loader:
        assert_equal(list(loader.epoch(0)), list(make_loader(shards, augment=AUGMENT).epoch(0)))


def test_resuming_gives_the_same_tail(
    shards: ShardSet, with_two_workers: Loader, make_loader: Callable[..., Loader], assert_equal: Callable[..., None]
) -> None:
    settings = {"augment": AUGMENT, "captions_per_image": 2, "token_dropout": 0.3}
    whole = list(make_loader(shards, **settings).epoch(3))
    for start in (0, 1, 5, 7, 8):
        assert_equal(list(make_loader(shards, **settings).epoch(3, start)), whole[start:])
    assert_equal(list(with_two_workers.epoch(3, start=5)), whole[5:])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_give_the_batches_of_one(
    shards: ShardSet, world_size: int, make_loader: Callable[..., Loader]
) -> None:
    alone = list(make_loader(shards, augment=AUGMENT, batch_size=8).epoch(1))
    ranks = [
        list(make_loader(shards, augment=AUGMENT, batch_size=8, rank=rank, world_size=world_size).epoch(1))
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
    sizes: list[int],
    batch: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
    coloured: Any,
    make_loader: Callable[..., Loader],
) -> None:
    world_size = data.draw(st.integers(1, 3))
    shards = coloured.write(tmp_path_factory.mktemp("layout"), sizes)
    loaders = [
        make_loader(
            shards, batch_size=batch * world_size, rank=rank, world_size=world_size, remainder="keep", augment=None
        )
        for rank in range(world_size)
    ]
    batches = [one for loader in loaders for one in loader.epoch(1)]
    assert len({loader.num_batches for loader in loaders}) == 1
    ids = torch.cat([one.ids[one.valid] for one in batches]).tolist()
    assert sorted(ids) == list(range(sum(sizes)))


def test_several_captions_an_image_are_ragged(
    shards: ShardSet, coloured: Any, make_loader: Callable[..., Loader]
) -> None:
    for batch in make_loader(shards, captions_per_image=2).epoch(0):
        counts = torch.bincount(batch.text_to_image, minlength=10).tolist()
        assert counts == [min(2, len(coloured.captions(number))) for number in batch.ids.tolist()]
        assert batch.tokens.shape[0] == batch.caption_hash.shape[0] == sum(counts)
        coloured.check_pairs(batch, shards)


def test_every_caption_is_used_over_the_epochs(
    shards: ShardSet, coloured: Any, make_loader: Callable[..., Loader]
) -> None:
    loader, seen = make_loader(shards), set()
    for epoch in range(25):
        for batch in loader.epoch(epoch):
            seen.update(batch.caption_hash.tolist())
    expected = {caption_hash(caption) for number in range(83) for caption in coloured.captions(number)}
    assert seen == expected


def test_tokens_are_as_wide_as_the_longest_text(
    tmp_path: Path, coloured: Any, make_loader: Callable[..., Loader]
) -> None:
    texts = ["a", "a b c d", "word " * 40]

    def edit(number: int, files: dict[str, bytes]) -> dict[str, bytes]:
        return {**files, "txt": texts[number].encode()}

    shards = coloured.write(tmp_path, [3], edit)
    loader = make_loader(shards, batch_size=1, shuffle=False)
    assert [batch.tokens.shape[1] for batch in loader.epoch(0)] == [3, 6, 16]
    assert loader.report().num_full_texts == 1 and loader.report().num_texts == 3
    whole = Loader(shards, TextTokenizer(CLIP_BPE, 16, full_context=True), batch_size=1, preprocess=Preprocess(size=8))
    assert {batch.tokens.shape[1] for batch in whole.epoch(0)} == {16}


def test_token_ids_stored_in_the_shards_are_used(
    tmp_path: Path, coloured: Any, make_loader: Callable[..., Loader]
) -> None:
    coloured.write(tmp_path, [4])
    stored = [[[1, 100 * number + view, 2] for view in range(len(coloured.captions(number)))] for number in range(4)]
    write_index(tmp_path / "00000.tar", {CLIP_BPE: stored})
    shards = ShardSet.open(tmp_path)
    (batch,) = make_loader(shards, batch_size=4, captions_per_image=3, shuffle=False).epoch(0)
    assert batch.tokens.tolist() == [row for rows in stored for row in rows]


def test_tokens_of_another_tokenizer_are_not_used(
    tmp_path: Path, coloured: Any, make_loader: Callable[..., Loader]
) -> None:
    coloured.write(tmp_path, [4])
    write_index(tmp_path / "00000.tar", {"hf:other": [[[7]] * len(coloured.captions(number)) for number in range(4)]})
    shards = ShardSet.open(tmp_path)
    (batch,) = make_loader(shards, batch_size=4).epoch(0)
    coloured.check_pairs(batch, shards)


def test_a_plain_function_as_tokenizer(
    shards: ShardSet, make_loader: Callable[..., Loader], assert_equal: Callable[..., None]
) -> None:
    padded = TextTokenizer(CLIP_BPE, 16, full_context=True)
    loader = Loader(shards, lambda texts: padded(texts), batch_size=10, preprocess=Preprocess(size=16))
    assert_equal(list(loader.epoch(0)), list(make_loader(shards).epoch(0)))


def break_some(number: int, files: dict[str, bytes]) -> dict[str, bytes]:
    broken: dict[int, dict[str, bytes]] = {
        5: {"png": b"<html>not found</html>"},
        20: {"png": files["png"][:-30]},
        41: {"txt": b" \n"},
        42: {"png": b"", "txt": b""},
    }
    return {**files, **broken.get(number, {})}


def test_broken_samples_keep_their_row(
    tmp_path: Path, shards: ShardSet, coloured: Any, make_loader: Callable[..., Loader]
) -> None:
    """The others stay what and where they are; the report says how many, why and where."""
    damaged = coloured.write(tmp_path, edit=break_some)
    loader = make_loader(damaged, max_bad_fraction=0.2, remainder="keep", augment=AUGMENT)
    sound = make_loader(shards, remainder="keep", augment=AUGMENT)
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


def test_too_many_broken_samples_stop_the_epoch(
    tmp_path: Path, coloured: Any, make_loader: Callable[..., Loader]
) -> None:
    def edit(number: int, files: dict[str, bytes]) -> dict[str, bytes]:
        return {**files, "png": b"rubbish"} if 45 <= number < 54 else files

    damaged = coloured.write(tmp_path, edit=edit)
    with pytest.raises(DataError) as caught:
        list(make_loader(damaged, max_bad_fraction=0.05).epoch(0))
    message = str(caught.value)
    assert "samples could not be read (" in message and "x not an image)" in message
    assert "more than max_bad_fraction = 0.05 allows. Worst: 00004.tar: " in message
    assert "00004/00004" in message and "vlkit shards validate" in message
    with make_loader(damaged, max_bad_fraction=0.05, workers=1) as loader, pytest.raises(DataError) as in_worker:
        list(loader.epoch(0))
    assert str(in_worker.value) == message
    list(make_loader(damaged, max_bad_fraction=0.2).epoch(0))


def test_no_broken_sample_is_allowed_with_a_fraction_of_zero(
    tmp_path: Path, coloured: Any, make_loader: Callable[..., Loader]
) -> None:
    damaged = coloured.write(tmp_path, [5], lambda number, files: {**files, "png": b"x"} if number == 3 else files)
    with pytest.raises(DataError, match=r"1 of \d samples could not be read"):
        list(make_loader(damaged, batch_size=1, max_bad_fraction=0.0).epoch(0))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"workers": -1}, r"workers is -1; expected at least 0"),
        ({"captions_per_image": 0}, r"captions_per_image is 0"),
        ({"max_bad_fraction": 2.0}, r"max_bad_fraction is 2.0; a fraction lies in \[0, 1\]"),
        ({"batch_size": 9, "world_size": 2}, r"9, which does not split evenly over 2"),
    ],
)
def test_settings_that_make_no_sense(
    shards: ShardSet, settings_: dict[str, Any], message: str, make_loader: Callable[..., Loader]
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_loader(shards, **settings_)


def test_image_size_replaces_that_of_the_preprocessing(shards: ShardSet, make_loader: Callable[..., Loader]) -> None:
    assert next(iter(make_loader(shards, image_size=24).epoch(0))).images.shape == (10, 3, 24, 24)
