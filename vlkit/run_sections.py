"""Sections of the run file about losses, adapters and stages of training; see `vlkit/config.py`."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from vlkit.settings import Count, Fraction, NotNegative, Part, Positive, Settings, Text


def _weight_as_table(term: object) -> object:
    """`clip = 0.5` is short for `clip = { weight = 0.5 }`."""
    if term is None or isinstance(term, dict):
        return term
    if isinstance(term, int | float) and not isinstance(term, bool) and 0 < term < float("inf"):
        return {"weight": float(term)}
    raise ValueError('expected a weight above 0, or a table such as { weight = 1.0, duplicates = "mask" }')


class TermSettings(Settings):
    """What every loss has."""

    weight: Positive = 1.0
    tile_size: Count = 1 << 22  # logits that exist at a time: fewer take less memory and more time

    @property
    def arguments(self) -> dict[str, Any]:
        """What the loss itself is made with."""
        return self.model_dump(exclude={"weight"})


class PairLossSettings(TermSettings):
    """[loss.clip], [loss.sigmoid]: a loss over all pairs of the batch. `clip = 1.0` gives the weight alone."""

    # "mask": equal captions and the same image are no negatives of each other; "keep": they are.
    duplicates: Literal["keep", "mask"] = "keep"


class FastClipSettings(TermSettings):
    """[loss.fast_clip]: each sample against what it met in the whole run."""

    version: Literal[1, 3] = 3  # 1: the temperature stays where it starts; 3: it is learned
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.2  # share of the newest batch in a normaliser, after the decay
    gamma_decay: Fraction = 0.5  # share of the run in which gamma falls from 1
    rho: NotNegative = 6.5  # version 3: against a vanishing temperature
    duplicates: Literal["keep", "mask"] = "keep"


class DistillationSettings(TermSettings):
    """[loss.distillation]: the similarities of a teacher; without a name its features are stored in the shards."""

    teacher: Text | None = None  # any load_encoder name
    # Of stored features; default: the teacher's where the shards say it, else 100. One with a name brings its own.
    logit_scale: Positive | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What the loss itself is made with."""
        scale = {} if self.logit_scale is None else {"logit_scale": self.logit_scale}
        return {**scale, "tile_size": self.tile_size}


class PatchAlignmentSettings(TermSettings):
    """[loss.patch_alignment]: patches of the image that a text attends to; trains a head on the patch tokens."""

    attention_scale: Positive = 10.0  # of the cosine inside the attention
    learn_attention_scale: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """What the loss itself is made with, beside its head."""
        return {"tile_size": self.tile_size}


class LossSettings(Settings):
    """[loss]: the terms and their weights; clip = 1.0 when none is named."""

    clip: Annotated[PairLossSettings | None, BeforeValidator(_weight_as_table)] = None
    sigmoid: Annotated[PairLossSettings | None, BeforeValidator(_weight_as_table)] = None
    fast_clip: Annotated[FastClipSettings | None, BeforeValidator(_weight_as_table)] = None
    distillation: Annotated[DistillationSettings | None, BeforeValidator(_weight_as_table)] = None
    patch_alignment: Annotated[PatchAlignmentSettings | None, BeforeValidator(_weight_as_table)] = None

    @model_validator(mode="before")
    @classmethod
    def _at_least_one(cls, terms: Any) -> Any:
        return terms or {"clip": 1.0}

    @property
    def terms(self) -> dict[str, TermSettings]:
        """The terms that are on."""
        return {name: term for name, term in self if term is not None}


class LoraSettings(Settings):
    """[model.lora]: small matrices are trained beside frozen weights, and added to them at the end."""

    rank: Count = 8
    alpha: Positive | None = None  # the update is multiplied by alpha / rank; default: alpha = rank
    towers: tuple[Literal["image", "text"], ...] = ("image", "text")
    # Which matrices of each block: of the attention q, k, v and its output o; the two of the MLP.
    targets: tuple[Literal["q", "k", "v", "o", "mlp"], ...] = ("q", "v")

    @model_validator(mode="after")
    def _something(self) -> Self:
        for name in ("towers", "targets"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty, so nothing would be trained")
        return self


class StageSettings(Settings):
    """[[stages]]: a part of the run with its own image size and text length, one after the other."""

    length: Part | None = None  # steps, "2 epochs", or a fraction of the run; the last stage has none: it fills the run
    image_size: Count | None = None  # default: the model's own
    text_length: Annotated[int, Field(ge=3)] | None = None  # tokens of a text, start and end included


def check_stages(stages: tuple[StageSettings, ...]) -> tuple[StageSettings, ...]:
    """Every stage but the last has a length."""
    for number, stage in enumerate(stages):
        last = number == len(stages) - 1
        if last and stage.length is not None:
            raise ValueError("the last of the stages has a length; leave it out: it lasts to the end of the run")
        if not last and stage.length is None:
            raise ValueError(f"stage {number} has no length, e.g. length = 0.8; only the last stage goes without")
    return stages
