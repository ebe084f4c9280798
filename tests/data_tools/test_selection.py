"""Selecting by rules, scores and uid lists; scores against numpy, lists against DataComp's own code."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from PIL import Image

from data_tools.build import build_shards
from data_tools.sample_scores import read_scores, threshold_of_fraction, write_scores
from data_tools.selection import Rules, select_samples
from data_tools.uid_lists import as_numbers, as_text, is_in, read_uids, write_uids
from vlkit.cli import main
from vlkit.data.records import ImageRef, Record, Source
from vlkit.data.shard_index import ShardSet
from vlkit.errors import ConfigError, DataError

SIZES = [(64, 64), (200, 40), (30, 30), (90, 64), (64, 80), (500, 64)]
CAPTIONS = ["a dog", "one two three four", "hm", "a much longer caption than these", "cat", "some three words"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection")
    records = []
    for i, (size, caption) in enumerate(zip(SIZES, CAPTIONS, strict=True)):
        buffer = io.BytesIO()
        Image.new("RGB", size, (40 * i, 20, 90)).save(buffer, "PNG")
        records.append(Record(f"image{i}", ImageRef(data=buffer.getvalue()), (caption, "x")))
    build_shards(Source(tuple(records), "table", folder), folder, samples_per_shard=4)
    return folder


def kept(selection):
    return np.flatnonzero(selection.keep).tolist()


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (Rules(), [0, 1, 2, 3, 4, 5]),
        (Rules(min_words=3), [1, 3, 5]),
        (Rules(min_characters=5), [0, 1, 3, 5]),
        (Rules(min_side=64), [0, 3, 4, 5]),
        (Rules(max_aspect=1.5), [0, 2, 3, 4]),
        (Rules(max_aspect=5, min_side=40, min_words=2), [0, 1, 3]),
    ],
)
def test_rules(shards, rules, expected):
    assert kept(select_samples(shards, rules=rules)) == expected


def test_scores_decide_with_rules_and_lists(shards, tmp_path):
    scores = np.array([0.1, 0.5, np.nan, 0.3, 0.3, 0.9], np.float32)
    found = select_samples(shards, scoring=lambda *_: scores, min_score=0.3)
    assert kept(found) == [1, 3, 4, 5] and found.num_scored == 5
    found = select_samples(shards, scoring=lambda *_: scores, keep_fraction=0.6)
    assert kept(found) == [1, 3, 4, 5] and found.threshold == pytest.approx(0.3)  # the equal ones stay together
    found = select_samples(shards, scoring=lambda *_: scores, keep_fraction=0.4, rules=Rules(min_words=4))
    assert kept(found) == [1] and dict(found.rows())["fewer than 4 words"] == 4
    write_uids(found.uids[[5, 0, 1]], tmp_path / "some.npy")
    assert kept(select_samples(shards, uid_list=tmp_path / "some.npy")) == [0, 1, 5]
    for wrong in ({"min_score": 1.0}, {"scoring": lambda *_: scores, "min_score": 1.0, "keep_fraction": 0.5}):
        with pytest.raises(ConfigError):
            select_samples(shards, **wrong)
    with pytest.raises(ConfigError, match="min_words = 0"):
        Rules(min_words=0)


@given(
    st_numpy.arrays(np.float32, st.integers(1, 60), elements=st.floats(width=32, allow_nan=True)),
    st.floats(0.01, 1),
)
def test_the_threshold_is_the_score_of_that_rank(scores, fraction):
    ordered = np.sort(scores[~np.isnan(scores)])[::-1]
    wanted = round(fraction * len(ordered))
    found = threshold_of_fraction(scores, fraction)
    if wanted:
        assert found == ordered[wanted - 1]
    else:
        assert np.isnan(found) if len(ordered) == 0 else found == np.inf


def test_score_tables(shards, tmp_path):
    chosen = select_samples(shards, scoring=lambda s, ids: np.arange(6, dtype=np.float32))
    opened = ShardSet.open(shards)
    ids = (chosen.uids, *_key_hashes(opened))
    write_scores(opened, chosen.uids, np.array([3, np.nan, 1, 4, 1, 5], np.float32), tmp_path / "own.parquet")
    found, unmatched = read_scores(tmp_path / "own.parquet", "score", *ids)
    assert np.array_equal(found, np.array([3, np.nan, 1, 4, 1, 5], np.float32), equal_nan=True) and unmatched == 0

    key = opened.shards[1].key(1)
    table = pa.table({"key": [opened.key(0), key, "absent"], "clip": [0.25, 0.5, 1]})
    pyarrow.csv.write_csv(table, tmp_path / "keys.csv")
    found, unmatched = read_scores(tmp_path / "keys.csv", "clip", *ids)
    assert (found[0], found[5], np.isnan(found).sum(), unmatched) == (0.25, 0.5, 4, 1)
    with pytest.raises(DataError, match=r"no column 'clap'\. Did you mean clip"):
        read_scores(tmp_path / "keys.csv", "clap", *ids)
    pq.write_table(pa.table({"url": ["a"], "clip": [1.0]}), tmp_path / "no.parquet")
    with pytest.raises(DataError, match="neither a column"):
        read_scores(tmp_path / "no.parquet", "clip", *ids)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="Cannot read the scores"):
        read_scores(tmp_path / "bad.parquet", "clip", *ids)


def _key_hashes(opened):
    from data_tools.sample_facts import hash64

    keys = [shard.key(row) for shard in opened.shards for row in range(len(shard))]
    names = [opened.key(sample) for sample in range(opened.num_samples)]
    return (np.array([hash64(text.encode()) for text in texts], np.uint64) for texts in (keys, names))


def test_uid_lists_are_those_of_datacomp(tmp_path):
    uids = ["ffffffffffffffff0000000000000001", "00000000000000010000000000000002", "ffffffffffffffff0000000000000000"]
    # As in DataComp's baselines: pairs of the upper and lower half, sorted, saved.
    theirs = np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids], np.dtype("u8,u8"))
    theirs.sort()
    np.save(tmp_path / "theirs.npy", theirs)
    write_uids(as_numbers([*uids, uids[0]]), tmp_path / "ours.npy")
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()
    read = read_uids(tmp_path / "theirs.npy")
    assert as_text(read) == sorted(uids)
    assert is_in(as_numbers([uids[2], "0" * 32, "f" * 32]), read).tolist() == [True, False, False]
    np.save(tmp_path / "unsorted.npy", theirs[::-1])
    assert as_text(read_uids(tmp_path / "unsorted.npy")) == sorted(uids)
    np.save(tmp_path / "floats.npy", np.zeros(3))
    for wrong in ("floats.npy", "absent.npy"):
        with pytest.raises(DataError, match=r"u8,u8"):
            read_uids(tmp_path / wrong)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return leaving.value.code or 0, captured.out, captured.err


def test_commands(shards, tmp_path, capsys):
    one = ("--workers", 1)
    code, out, err = run(
        capsys, "shards", "select", shards, "--min-words", 3, "--out", tmp_path / "a", "--write-uids",
        tmp_path / "a.npy", "--json", *one,
    )  # fmt: skip
    assert code == 0 and json.loads(out)["num_kept"] == 3 and "wrote 3 samples in 1 shards" in err
    assert ShardSet.open(tmp_path / "a").num_samples == 3 and len(np.load(tmp_path / "a.npy")) == 3
    code, out, _ = run(capsys, "shards", "select", shards, "--uids", tmp_path / "a.npy", *one)
    assert code == 0 and "not in the list" in out
    code, out, err = run(capsys, "shards", "select", shards, "--min-score", 3, *one)
    assert code == 1 and "needs scores" in err

    # All six are of one colour, so their bytes alone are compared.
    code, out, _ = run(capsys, "shards", "dedupe", shards, "--html", tmp_path / "d.html", "--json", *one)
    assert code == 0 and json.loads(out)["num_flat"] == 6 and (tmp_path / "d.html").is_file()
    code, out, err = run(
        capsys, "shards", "leakage", shards, "--against", f"own={tmp_path / 'a'}", "--leaks", tmp_path / "l.jsonl",
        "--out", tmp_path / "b", *one,
    )  # fmt: skip
    assert code == 0 and "own: format webdataset, 3 records" in err and "wrote 3 samples" in err
    assert sum(json.loads(line)["kind"] == "bytes" for line in (tmp_path / "l.jsonl").read_text().splitlines()) == 3

    (shards / "00001.tar").write_bytes((shards / "00001.tar").read_bytes()[:3000])
    code, out, err = run(capsys, "shards", "validate", shards, "--fix", tmp_path / "fixed", *one)
    assert code == 1 and "problem: " in out and "left out: " in err and "left_out.jsonl there lists" in err
    code, out, _ = run(capsys, "shards", "validate", tmp_path / "fixed", *one)
    assert code == 0 and "ok" in out


@pytest.mark.slow
def test_a_model_scores_pairs_and_confirms_copies(shards, tmp_path, capsys):
    import torch

    from vlkit.models.load import load_embedder
    from vlkit.models.open_clip_encoder import build_encoder
    from vlkit.models.saved import save_encoder

    text = {"context_length": 16, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}
    torch.manual_seed(0)
    save_encoder(build_encoder({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}), tmp_path / "model")
    model = ("--model", f"local-dir:{tmp_path / 'model'}", "--device", "cpu", "--workers", 1)
    records = []
    for seed in (1, 1, 2):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((96, 96)).save(buffer, "JPEG", quality=70 + len(records))
        records.append(Record(f"image{len(records)}", ImageRef(data=buffer.getvalue()), (f"text {seed}", "two texts")))
    build_shards(Source(tuple(records), "table", tmp_path), tmp_path / "s")

    code, out, _ = run(
        capsys, "shards", "select", tmp_path / "s", "--keep-fraction", 0.34, "--write-scores", tmp_path / "x.parquet",
        "--json", *model,
    )  # fmt: skip
    scores = pq.read_table(tmp_path / "x.parquet").column("score").to_pylist()
    embedder = load_embedder(f"local-dir:{tmp_path / 'model'}", "cpu")
    images = embedder.embed_images(records)
    texts = [embedder.embed_texts(list(record.captions)) for record in records]
    expected = [float((image @ text.T).mean()) for image, text in zip(images, texts, strict=True)]
    assert code == 0 and scores == pytest.approx(expected, abs=1e-6)
    assert json.loads(out)["num_kept"] == 1 and json.loads(out)["threshold"] == pytest.approx(max(expected))
    again = ("--scores", tmp_path / "x.parquet", "--workers", 1)
    code, out, _ = run(capsys, "shards", "select", tmp_path / "s", "--json", *again)
    assert code == 0 and json.loads(out)["num_scored"] == 3

    code, out, _ = run(capsys, "shards", "dedupe", tmp_path / "s", "--json", *model)
    assert code == 0 and json.loads(out)["copies"]["near"] == 1
    against = ("--against", f"e={tmp_path / 's'}")
    code, out, _ = run(capsys, "shards", "leakage", tmp_path / "s", *against, "--json", *model)
    assert code == 0 and json.loads(out)["sets"]["e"]["images_in_training"] == 3
