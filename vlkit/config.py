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

from pydantic import AfterValidator, Field, ValidationError, model_validator

from vlkit.configs import shipped_runs
from vlkit.errors import ConfigError, did_you_mean
from vlkit.run_sections import LoraSettings, LossSettings, StageSettings, check_stages
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
    Size,
    Sources,
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


class RunSettings(Settings):
    """[run]: where the results go, and how long the run is: exactly one of epochs, steps, samples."""

    out: Text
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    epochs: Positive | None = None
    steps: Count | None = None
    samples: Count | None = None
    device: Device = "auto"  # auto: the first of cuda, mps, cpu
    parallel: Literal["ddp", "fsdp"] = "ddp"  # fsdp: each process keeps a share of weights and optimiser state
    # A process that says nothing for so many seconds is taken for dead, and the others stop.
    peer_timeout: Annotated[float, Field(ge=3, allow_inf_nan=False)] = 60.0
    trackers: tuple[Text, ...] = ()  # "tensorboard", or a module with wandb's interface: "wandb", "trackio", ...
    peak_tflops: Positive | None = None  # of one device in this precision, for the MFU; default: from a table
    # When the loss is no number: so many times go back to the last checkpoint and leave out the data since then.
    rewinds: Annotated[int, Field(ge=0)] = 0

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
    init_image: Text | None = None  # beside name or architecture: weights of its timm image tower, "timm:NAME.TAG"
    freeze: tuple[Literal["image", "text"], ...] = ()  # towers that keep their weights
    # How many of the last layers of a frozen tower are trained all the same.
    unfreeze: dict[Literal["image", "text"], Count] = Field(default_factory=dict)
    lora: LoraSettings | None = None
    # FLIP: share of the patches left out in training, except in the last part of the run.
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    patch_dropout_tail: Part = Duration(0.1, "fraction")
    grad_checkpointing: bool = False  # compute activations again in backward instead of keeping them
    compile: bool = False  # torch.compile on each block of the towers

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        _check_exactly_one(self, "name", "architecture", "init")
        if self.init is not None and self.init_image is not None:
            raise ValueError("init brings both towers; init_image is for name or architecture")
        for tower in self.unfreeze:
            if tower not in self.freeze:
                raise ValueError(f"unfreeze names {tower}, which freeze does not: all of it is trained anyway")
        return self

    @property
    def frozen(self) -> bool:
        """Whether no weight of either tower is trained."""
        return len(set(self.freeze)) == 2 and not self.unfreeze and self.lora is None


class RandAugmentSettings(Settings):
    """[data.augment.rand_augment]: a few random distortions of one strength, see `vlkit/data/rand_augment.py`."""

    num_ops: Count = 2
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9


class AugmentSettings(Settings):
    """[data.augment]: how training images vary. The default is open_clip's: a crop of 90 to 100% of the area."""

    crop_scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.9, 1.0)
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)  # width / height of the crop
    hflip: Fraction = 0.0  # probability of mirroring
    # Strength of brightness, contrast, saturation, hue.
    color_jitter: tuple[NotNegative, NotNegative, NotNegative, Annotated[float, Field(ge=0, le=0.5)]] | None = None
    grayscale: Fraction = 0.0  # probability of losing colour
    rand_augment: RandAugmentSettings | None = None
    # A JPEG is decoded at no less than so many times the image's size. 1 is faster on large ones, and less exact.
    dct_scale: Literal[1, 2] = 2

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"{name} = [{low:g}, {high:g}]: expected [low, high]")
        return self


class CaptionSettings(Settings):
    """[data.captions]: which texts an image has; data.captions_per_image says how many."""

    fields: dict[Text, Positive] | None = None  # caption field of the .json ("txt": the .txt file) -> weight
    sub_captions: Count | None = None  # so many parts of the captions, of a few sentences each, in their place
    most_sentences: Count = 3  # of one part
    templates: Text | None = None  # class names in place of captions: "imagenet80", a file, or a text with {}
    class_names: Text | None = None  # file with a name a line; default: classnames.txt beside the shards
    class_field: Text | None = None  # field of the .json with the class name, in place of the .cls file

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.templates is None:
            alone = [name for name in ("class_names", "class_field") if getattr(self, name) is not None]
            if alone:
                raise ValueError(f"{alone[0]} is for templates, which are not given")
        elif self.fields is not None or self.sub_captions is not None:
            raise ValueError("templates take the place of captions; leave fields and sub_captions out")
        elif self.class_names is not None and self.class_field is not None:
            raise ValueError("class_names name the numbers in .cls files, class_field needs none; give one of them")
        return self


class DataSettings(Settings):
    """[data]: the shards and how they become batches."""

    # Tar, folder, glob, braces {00000..00099}, each a path or a URL; "a::b"; a list of these; or {path = weight, ...}.
    train: Sources
    val: Paths | None = None  # shards for the [[eval]] entries that name no data
    image_size: Count | None = None  # side in pixels; default: the architecture's own
    global_batch_size: Annotated[int, Field(ge=2)] = 256  # images per step over all processes
    # Images a process embeds at a time, for batches that do not fit: the same gradients for a second forward.
    chunk_size: Count | None = None  # default: its whole share of the batch
    workers: Workers = "auto"  # decoding processes beside each training process
    window: Count = 131_072  # samples mixed with each other; fewer read from fewer shards at a time
    # "200 GB": what shards at URLs may take on this machine's disk, in the cache (VLKIT_CACHE) that all runs share.
    cache_size: Size | None = None  # default: as set before, at first nine tenths of what the disk has free
    remainder: Literal["drop", "keep"] = "drop"  # samples of an epoch that fill no batch; keep: with empty rows
    samples_per_epoch: Count | None = None  # default: as many as there are
    replacement: bool = False  # draw every sample anew from all: for sets too large to pass over
    balance: Text | None = None  # equally many of each class in a batch: "cls", or a field of the .json
    max_bad_fraction: Fraction = 0.01  # the run stops when more of the samples than this cannot be read
    captions_per_image: Count = 1
    captions: CaptionSettings | None = None
    # Probability that a token of a caption is left out: against learning few captions by heart.
    token_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    augment: AugmentSettings | None = AugmentSettings()  # `augment = false` in the file: the evaluation's preprocessing
    second_view: AugmentSettings | None = None  # of each image, for losses that compare two views
    labels: bool = False  # batches hold the class numbers of the .cls files, for losses that need them


class OptimSettings(Settings):
    """[optim]: optimiser, learning rate schedule, precision."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: hidden matrices by Muon, the rest by AdamW
    lr: Positive = 5e-4  # at the top of the schedule
    matrix_lr: Positive | None = None  # of the matrices that Muon moves, at the top of the schedule; default: lr
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    eps: Positive = 1e-6
    weight_decay: NotNegative = 0.2
    warmup: Part = Duration(0.05, "fraction")  # steps, "2 epochs", or a fraction of the run
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    min_lr: NotNegative = 0.0  # where the schedule ends
    decay: Part = Duration(0.2, "fraction")  # of "wsd": the last part of the run, in which the rate falls
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # each layer learns at this share of the one after it
    logit_scale_lr: Positive | None = None  # of the temperature, at the top of the schedule; default: lr
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # averaged weights, evaluated and saved beside the others
    clip_norm: Positive | None = None  # gradients longer than this are shortened to it
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where CUDA has it, else fp32

    @model_validator(mode="after")
    def _lr_range(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr:g} is above lr = {self.lr:g}")
        return self

    @model_validator(mode="after")
    def _matrices_of_muon(self) -> Self:
        if self.matrix_lr is not None and self.name != "muon":
            raise ValueError(f'matrix_lr is of name = "muon"; name = "{self.name}" has no such rate; leave it out')
        return self


# The commands of `vlkit eval` that can be followed through a training.
EvaluatorName = Literal[
    "retrieval", "classification", "probe", "few-shot", "knn", "base-to-new", "cross-dataset", "ood",
    "image-retrieval", "worst-group", "caption-judgement", "image-caption-choice", "text-similarity", "segmentation",
    "referring", "pointing", "explanation", "composed-retrieval", "conditional-retrieval", "blind-pairs", "mine-pairs",
    "vocabulary-free", "cluster-and-name", "doubly-right",
]  # fmt: skip


class EvalSettings(Settings):
    """[[eval]]: one evaluation during training, by the evaluator's name or under a protocol (`vlkit protocols`)."""

    name: EvaluatorName | None = None
    protocol: Text | None = None  # fixes split, captions, class names and templates
    options: dict[str, Any] = Field(default_factory=dict)  # of the evaluator, as of its command, e.g. {k = [1, 10]}
    data: Paths
    format: Text | None = None  # default: found out from the data
    split: Text | None = None
    images: Text | None = None  # folder of the images, where the annotations lie elsewhere
    every: Period = Duration(1, "epochs")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.name is None) == (self.protocol is None):
            raise ValueError('expected either name = "retrieval" or another evaluator, or protocol = "..."')
        if self.protocol is not None and (self.split is not None or self.format is not None):
            raise ValueError(f"split and format are fixed by protocol {self.protocol}; leave them out")
        if self.protocol is not None and self.options:
            raise ValueError(f"protocol {self.protocol} takes no options; leave them out")
        return self


class CheckpointSettings(Settings):
    """[checkpoint]: when to save, what to keep."""

    every: Period = Duration(1, "epochs")
    in_background: bool = True  # written while training goes on; takes a copy of weights and state in main memory
    upload: Text | None = None  # an fsspec URL that gets a copy of each, e.g. "s3://bucket/run"
    keep_last: Count = 2
    keep_best: Text | None = None  # a metric such as "text_to_image/recall@10"; its highest checkpoint is kept too


class RunConfig(Settings):
    """A whole run file."""

    run: RunSettings
    model: ModelSettings
    data: DataSettings
    loss: LossSettings = Field(default_factory=lambda: LossSettings.model_validate({}))
    optim: OptimSettings = OptimSettings()
    stages: Annotated[tuple[StageSettings, ...], AfterValidator(check_stages)] = ()
    eval: tuple[EvalSettings, ...] = ()
    checkpoint: CheckpointSettings = CheckpointSettings()

    @model_validator(mode="after")
    def _something_trained(self) -> Self:
        if self.model.frozen and self.loss.patch_alignment is None:
            raise ValueError("model.freeze names both towers, so only the temperature would be trained; name one")
        if self.loss.patch_alignment is not None and self.model.patch_dropout:
            raise ValueError("loss.patch_alignment compares all patches; leave model.patch_dropout out")
        return self

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
    if run.optim.schedule != "wsd" and run.optim.decay != OptimSettings().decay:
        found.append(f"optim.decay has no effect: the schedule is {run.optim.schedule}.")
    tail = ModelSettings.model_fields["patch_dropout_tail"].default
    if not run.model.patch_dropout and run.model.patch_dropout_tail != tail:
        found.append("model.patch_dropout_tail has no effect: model.patch_dropout is 0.")
    mixed = isinstance(run.data.train, dict) or run.data.samples_per_epoch or run.data.replacement or run.data.balance
    if mixed and "remainder" in run.data.model_fields_set:
        found.append("data.remainder has no effect: with this kind of sampling every batch is full.")
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
    if isinstance(value, dict):
        return {_replace_out(source, out): weight for source, weight in value.items()}
    return value.replace("{out}", out) if isinstance(value, str) and isinstance(out, str) else value
