"""The run file: TOML in, frozen and strict settings out, and the resolved JSON that is kept with the results.

    run = load_run("flickr8k_small", ["run.out=runs/try", "optim.lr=3e-4"])
    run.optim.lr                    # 0.0003
    run.to_json()                   # every setting, defaults included
    remarks(run)                    # settings that have no effect, one sentence each

Each class below is a section of the file, each attribute one key. Unknown keys, wrong types and values out of
range are reported all at once. A length of time is written "500 steps", "2 epochs", "100000 samples" or
"300 seconds". `{out}` in a data path stands for `run.out`. An [[eval]] without `data` runs on `data.val`.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from vlkit.configs import shipped_runs
from vlkit.errors import ConfigError, did_you_mean
from vlkit.settings import (
    Count,
    Device,
    Duration,
    Fraction,
    NotNegative,
    Part,
    Paths,
    Period,
    Positive,
    Settings,
    Text,
    Workers,
    apply_override,
    problems,
)

# Of each group exactly one key is given; an override of one replaces whichever the file holds.
EXCLUSIVE = (
    ("run.epochs", "run.steps", "run.samples"),
    ("model.name", "model.architecture", "model.init"),
)


def _weight_as_table(term: object) -> object:
    """`clip = 0.5` is short for `clip = { weight = 0.5 }`."""
    if term is None or isinstance(term, dict):
        return term
    if isinstance(term, int | float) and not isinstance(term, bool) and 0 < term < float("inf"):
        return {"weight": float(term)}
    raise ValueError('expected a weight above 0, or a table such as { weight = 1.0, duplicates = "mask" }')


class RunSettings(Settings):
    """[run]: where the results go, and how long the run is: exactly one of epochs, steps, samples."""

    out: Text
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    epochs: Positive | None = None
    steps: Count | None = None
    samples: Count | None = None
    device: Device = "auto"  # auto: the first of cuda, mps, cpu

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        _check_exactly_one(self, "epochs", "steps", "samples")
        return self

    @property
    def length(self) -> Duration:
        """How long the run is."""
        if self.epochs is not None:
            return Duration(self.epochs, "epochs")
        return Duration(self.steps, "steps") if self.steps is not None else Duration(self.samples or 0, "samples")


class ModelSettings(Settings):
    """[model]: exactly one of `name` (an architecture), `architecture` (inline) and `init` (start from weights)."""

    name: Text | None = None  # an open_clip architecture, e.g. "ViT-B-32"; weights are random
    architecture: dict[str, Any] | None = None  # open_clip's model_cfg: embed_dim, vision_cfg, text_cfg, ...
    init: Text | None = None  # any load_encoder name, e.g. "open_clip:ViT-B-32/laion2b_s34b_b79k"
    freeze: tuple[Literal["image", "text"], ...] = ()  # towers that keep their weights

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        _check_exactly_one(self, "name", "architecture", "init")
        if len(set(self.freeze)) == 2:
            raise ValueError("freeze names both towers, so only the temperature would be trained; name one")
        return self


class AugmentSettings(Settings):
    """[data.augment]: how training images vary. The default is open_clip's: a crop of 90 to 100% of the area."""

    crop_scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.9, 1.0)
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)  # width / height of the crop
    hflip: Fraction = 0.0  # probability of mirroring
    # Strength of brightness, contrast, saturation, hue.
    color_jitter: tuple[NotNegative, NotNegative, NotNegative, Annotated[float, Field(ge=0, le=0.5)]] | None = None
    grayscale: Fraction = 0.0  # probability of losing colour

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"{name} = [{low:g}, {high:g}]: expected [low, high]")
        return self


class DataSettings(Settings):
    """[data]: the shards and how they become batches."""

    train: Paths  # tar, folder, glob, braces {00000..00099}, "a::b", or a list of these
    val: Paths | None = None  # shards for the [[eval]] entries that name no data
    image_size: Count | None = None  # side in pixels; default: the architecture's own
    global_batch_size: Annotated[int, Field(ge=2)] = 256  # images per step over all processes
    # Images a process embeds at a time, for batches that do not fit: the same gradients for a second forward.
    chunk_size: Count | None = None  # default: its whole share of the batch
    workers: Workers = "auto"  # decoding processes beside each training process
    max_bad_fraction: Fraction = 0.01  # the run stops when more of the samples than this cannot be read
    captions_per_image: Count = 1
    # Probability that a token of a caption is left out: against learning few captions by heart.
    token_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    augment: AugmentSettings | None = AugmentSettings()  # `augment = false` in the file: the evaluation's preprocessing


class PairLossSettings(Settings):
    """[loss.clip], [loss.sigmoid]: a loss over all pairs of the batch. `clip = 1.0` gives the weight alone."""

    weight: Positive = 1.0
    # "mask": equal captions and the same image are no negatives of each other; "keep": they are.
    duplicates: Literal["keep", "mask"] = "keep"


class LossSettings(Settings):
    """[loss]: the terms and their weights; clip = 1.0 when none is named."""

    clip: Annotated[PairLossSettings | None, BeforeValidator(_weight_as_table)] = None
    sigmoid: Annotated[PairLossSettings | None, BeforeValidator(_weight_as_table)] = None

    @model_validator(mode="before")
    @classmethod
    def _at_least_one(cls, terms: Any) -> Any:
        return terms or {"clip": 1.0}

    @property
    def terms(self) -> dict[str, PairLossSettings]:
        """The terms that are on."""
        return {name: term for name, term in self if term is not None}


class OptimSettings(Settings):
    """[optim]: optimiser, learning rate schedule, precision."""

    name: Literal["adamw"] = "adamw"
    lr: Positive = 5e-4  # at the top of the schedule
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    eps: Positive = 1e-6
    weight_decay: NotNegative = 0.2
    warmup: Part = Duration(0.05, "fraction")  # steps, "2 epochs", or a fraction of the run
    schedule: Literal["cosine", "constant"] = "cosine"
    min_lr: NotNegative = 0.0  # where the cosine ends
    clip_norm: Positive | None = None  # gradients longer than this are shortened to it
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where CUDA has it, else fp32

    @model_validator(mode="after")
    def _lr_range(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr:g} is above lr = {self.lr:g}")
        return self


class EvalSettings(Settings):
    """[[eval]]: one evaluation during training."""

    name: Literal["retrieval", "classification"]
    data: Paths
    format: Text | None = None  # default: found out from the data
    split: Text | None = None
    images: Text | None = None  # folder of the images, where the annotations lie elsewhere
    every: Period = Duration(1, "epochs")


class CheckpointSettings(Settings):
    """[checkpoint]: when to save, what to keep."""

    every: Period = Duration(1, "epochs")
    keep_last: Count = 2
    keep_best: Text | None = None  # a metric such as "text_to_image/recall@10"; its highest checkpoint is kept too


class RunConfig(Settings):
    """A whole run file."""

    run: RunSettings
    model: ModelSettings
    data: DataSettings
    loss: LossSettings = Field(default_factory=lambda: LossSettings.model_validate({}))
    optim: OptimSettings = OptimSettings()
    eval: tuple[EvalSettings, ...] = ()
    checkpoint: CheckpointSettings = CheckpointSettings()

    @model_validator(mode="after")
    def _best_of_something(self) -> Self:
        if self.checkpoint.keep_best and not self.eval:
            raise ValueError("checkpoint.keep_best names a metric, but there is no [[eval]] to give it")
        return self

    def to_json(self) -> str:
        """Every setting, defaults included; `load_run` reads it back to an equal run."""
        return json.dumps(self.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"


def load_run(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply overrides, check everything.

    Args:
        source: path of a TOML file, name of a shipped run, a run folder's config.json, or the same as a dict.
        overrides: "section.key=value", the value in TOML; what is no TOML is taken as text.

    Returns:
        The run, defaults filled in.

    Raises:
        ConfigError: the file is missing or is no TOML, or it has problems; all of them are in one message.
    """
    name, tree = _read(source)
    for override in overrides:
        apply_override(tree, override, EXCLUSIVE)
    _fill(tree)
    try:
        # JSON, because strict pydantic takes a list for a tuple there, and config.json is read the same way.
        return RunConfig.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        lines = problems(error, RunConfig)
    except TypeError as error:
        lines = [f"{error}: no setting takes a TOML date or time."]
    count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
    raise ConfigError(f"{name} has {count}:\n  " + "\n  ".join(lines))


def remarks(run: RunConfig) -> list[str]:
    """One sentence for each setting of the run that has no effect."""
    found = []
    if run.optim.schedule == "constant" and run.optim.min_lr:
        found.append(f"optim.min_lr = {run.optim.min_lr:g} has no effect: the schedule is constant.")
    if run.data.val is not None and all(entry.data != run.data.val for entry in run.eval):
        found.append("data.val has no effect: no [[eval]] runs on it.")
    return found


def _check_exactly_one(section: Settings, *names: str) -> None:
    given = [name for name in names if getattr(section, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) if given else "none of them"
        raise ValueError(f"expected exactly one of {', '.join(names)}; found {found}")


def _read(source: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What to call the run in messages, and its raw tree, a copy of our own."""
    if isinstance(source, Mapping):
        return "The run", json.loads(json.dumps(source))
    shipped = shipped_runs()
    path = Path(source)
    if not path.exists() and str(source) in shipped:
        path = shipped[str(source)]
    if not path.is_file():
        hint = did_you_mean(str(source), shipped)
        raise ConfigError(f"No run file {path}: expected the path of a TOML file or the name of a shipped run. {hint}")
    try:
        text = path.read_text(encoding="utf-8")
        return str(path), json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:  # both parsers and the decoder raise children of ValueError
        raise ConfigError(f"Cannot read run file {path}: {error}.") from error


def _fill(tree: dict[str, Any]) -> None:
    """Put `run.out` for {out} into data paths, and `data.val` where an [[eval]] names no data."""
    run, data, evaluations = (tree.get(name) for name in ("run", "data", "eval"))
    data = data if isinstance(data, dict) else {}
    entries = [entry for entry in evaluations if isinstance(entry, dict)] if isinstance(evaluations, list) else []
    out = run.get("out") if isinstance(run, dict) else None
    if data.get("augment") is False:
        data["augment"] = None
    for section in (data, *entries):
        if section is not data and "val" in data:
            section.setdefault("data", data["val"])
        for key in section.keys() & {"train", "val", "data", "images"}:
            section[key] = _replace_out(section[key], out)


def _replace_out(value: Any, out: Any) -> Any:
    if isinstance(value, list):
        return [_replace_out(item, out) for item in value]
    return value.replace("{out}", out) if isinstance(value, str) and isinstance(out, str) else value
