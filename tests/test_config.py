"""The run file: what is accepted, what every kind of mistake is told, and that it is read back as written."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vlkit.config import RunConfig, load_run, remarks
from vlkit.configs import shipped_runs
from vlkit.errors import ConfigError
from vlkit.settings import Duration

RUN = """
[run]
out = "runs/x"
epochs = 2

[model]
name = "ViT-B-32"

[data]
train = "{out}/shards"
val = ["a.tar", "{out}/b.tar"]

[optim]
lr = 1e-3
warmup = 0.1

[[eval]]
name = "retrieval"
every = "500 steps"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(RUN)
    return file


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the message, without its head."""
    with pytest.raises(ConfigError) as raised:
        load_run(path, overrides)
    head, *lines = str(raised.value).split("\n")
    assert str(path) in head
    assert head.endswith("a problem:" if len(lines) == 1 else f"{len(lines)} problems:")
    return [line.strip() for line in lines]


def test_a_run_file_with_its_defaults(path: Path) -> None:
    run = load_run(path)
    assert run.run.length == Duration(2, "epochs")
    assert run.data.train == "runs/x/shards"
    assert run.eval[0].data == ["a.tar", "runs/x/b.tar"]  # data.val stands in
    assert run.eval[0].every == Duration(500, "steps")
    assert run.optim.warmup == Duration(0.1, "fraction")
    assert run.data.augment is not None and run.data.augment.crop_scale == (0.9, 1.0)
    assert remarks(run) == []


def test_the_resolved_json_is_the_same_run(path: Path, tmp_path: Path) -> None:
    run = load_run(path, ["data.augment=false", "checkpoint.keep_best=text_to_image/recall@1"])
    resolved = tmp_path / "config.json"
    resolved.write_text(run.to_json())
    assert load_run(resolved) == run
    assert run.data.augment is None


def test_settings_are_frozen(path: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_run(path).optim.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key. Did you mean lr?"),
        ("lr=1", "lr: unknown key. Did you mean optim.lr?"),
        ("data.hflip=0.5", "data.hflip: unknown key. Did you mean data.augment.hflip or data.second_view.hflip?"),
        ("optimizer.lr=1", "optimizer: unknown key. Did you mean optim?"),
        ('optim.lr="fast"', 'optim.lr = "fast": expected a valid number.'),
        ("optim.lr=-1", "optim.lr = -1: expected greater than 0."),
        ("optim.lr=nan", "optim.lr = NaN: expected a finite number."),
        ("data.global_batch_size=2.5", "data.global_batch_size = 2.5: expected a valid integer."),
        ("data.global_batch_size=1", "data.global_batch_size = 1: expected greater than or equal to 2."),
        ("data.train=[]", "data.train = []: expected a path, or a list of paths."),
        ("data.workers=many", 'data.workers = "many": expected "auto" or a number of processes from 0.'),
        ("data.augment.crop_scale=[0.5, 0.1]", "data.augment: crop_scale = [0.5, 0.1]: expected [low, high]."),
        ("model.freeze=[image]", 'model.freeze = "[image]": expected a list.'),
        ('model.freeze=["vision"]', "model.freeze.0 = \"vision\": expected 'image' or 'text'."),
        ('model.freeze=["image", "text"]', "only the temperature would be trained"),
        ("optim.warmup=10.5", "expected a number of steps, a fraction of the run below 1"),
        ("optim.warmup=10 seconds", "expected a number of steps, a fraction of the run below 1"),
        ("optim.min_lr=1", "optim: min_lr = 1 is above lr = 0.001."),
        ("checkpoint.every=0", "checkpoint.every = 0: expected a duration above 0."),
        ("eval.0.every=1 epok", 'eval.0.every = "1 epok": expected a duration such as "500 steps"'),
        ("eval.0.name=recall", "eval.0.name = \"recall\": expected 'retrieval', 'classification', "),
        ("run.device=gpu", 'run.device = "gpu": expected "auto", "cpu", "mps", "cuda" or e.g. "cuda:1".'),
        ("run.when=2026-01-01", "no setting takes a TOML date or time"),
    ],
)
def test_each_mistake_is_named_with_its_place(path: Path, override: str, message: str) -> None:
    (line,) = problems(path, override)
    assert message in line


def test_all_mistakes_are_reported_at_once(path: Path) -> None:
    lines = problems(path, "optim.lrr=1", "run.seed=-1", "data.captions_per_image=0", "loss.clip=0")
    assert [line.split(" ")[0].strip(":") for line in lines] == [
        "run.seed", "data.captions_per_image", "loss.clip", "optim.lrr",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": {"out": "x"}}, "run: expected exactly one of epochs, steps, samples; found none of them."),
        ({"run": {"out": "x", "epochs": 1, "steps": 3}}, "found epochs and steps."),
        ({"model": {}}, "model: expected exactly one of name, architecture, init; found none of them."),
        ({"data": {}}, "data.train: missing."),
        ({"data": {"train": "x"}, "eval": [{"name": "retrieval"}]}, "eval.0.data: missing."),
        ({"eval": 3}, "eval = 3: expected a list."),
        ({"data": 3}, "data = 3: expected a table."),
        ({"checkpoint": {"keep_best": "recall"}}, "there is no [[eval]] to give it."),
    ],
)
def test_what_is_missing_or_too_much(change: dict[str, Any], message: str) -> None:
    good = {"run": {"out": "x", "steps": 1}, "model": {"name": "a"}, "data": {"train": "x"}}
    assert load_run(good).run.steps == 1
    with pytest.raises(ConfigError) as raised:
        load_run({**good, **change})
    assert message in str(raised.value)


def test_overrides(path: Path) -> None:
    run = load_run(
        path,
        [
            "run.steps=7",
            "run.out=/data/my runs",
            "model.architecture.embed_dim=8",
            "eval.0.split=test",
            "optim.betas=[0, 0.9]",
        ],
    )
    assert (run.run.steps, run.run.epochs) == (7, None)  # one length takes the place of the other
    assert run.run.out == "/data/my runs" and run.data.train == "/data/my runs/shards"
    assert run.model.name is None and run.model.architecture == {"embed_dim": 8}
    assert run.eval[0].split == "test"
    assert run.optim.betas == (0.0, 0.9)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "expected section.key=value"),
        ("optim..lr=1", "expected section.key=value"),
        ("run.out.x=1", "run.out is \"runs/x\" and has no 'x'"),
        ("eval.1.every=1", "eval is a list of 1 and has no '1'"),
        ("eval.first=1", "eval is a list of 1 and has no 'first'"),
    ],
)
def test_overrides_that_lead_nowhere(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_run(path, [override])
    assert message in str(raised.value)


def test_files_that_are_no_run_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean demo"):
        load_run("demoo")
    with pytest.raises(ConfigError, match="No run file"):
        load_run(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\nout=3")
    with pytest.raises(ConfigError, match=r"Cannot read run file .*broken\.toml: .*line 1"):
        load_run(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="Cannot read run file"):
        load_run(broken)


def test_settings_without_effect_are_named(path: Path) -> None:
    run = load_run(path, ["optim.schedule=constant", "optim.min_lr=1e-5", "eval.0.data=other"])
    assert remarks(run) == [
        "optim.min_lr = 1e-05 has no effect: the schedule is constant.",
        "data.val has no effect: no [[eval]] runs on it.",
    ]


def test_every_shipped_run_opens_and_has_its_head() -> None:
    assert {"demo", "flickr8k_small", "clip_vit_b32", "cc12m_vit_b32"} <= shipped_runs().keys()
    for name, path in shipped_runs().items():
        run = load_run(name)
        assert isinstance(run, RunConfig)
        assert remarks(run) == []
        head = path.read_text().split("\n[run]")[0]
        for word in ("Hardware:", "Time:", "Expected:", "vlkit "):
            assert word in head, f"{name} does not say {word}"


@pytest.mark.parametrize(
    ("text", "parsed", "shown"),
    [
        ("500 steps", Duration(500, "steps"), "500 steps"),
        ("1 epoch", Duration(1, "epochs"), "1 epoch"),
        ("0.5 epochs", Duration(0.5, "epochs"), "0.5 epochs"),
        ("1e6 samples", Duration(1_000_000, "samples"), "1000000 samples"),
        (" 300seconds ", Duration(300, "seconds"), "300 seconds"),
        (12, Duration(12, "steps"), "12 steps"),
    ],
)
def test_durations(text: object, parsed: Duration, shown: str) -> None:
    assert Duration.parse(text) == parsed
    assert str(parsed) == shown
    assert Duration.parse(shown) == parsed


@pytest.mark.parametrize("text", ["", "steps", "-1 steps", "1.2.3 steps", "3 weeks", True, 1.5, None, -3])
def test_what_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match="expected a duration such as"):
        Duration.parse(text)


def test_durations_in_steps() -> None:
    def steps(amount: float, unit: Any) -> int:
        return Duration(amount, unit).in_steps(total=1000, steps_per_epoch=40, batch_size=256)

    assert [steps(7, "steps"), steps(0.25, "epochs"), steps(2560, "samples"), steps(0.05, "fraction")] == [
        7,
        10,
        10,
        50,
    ]
