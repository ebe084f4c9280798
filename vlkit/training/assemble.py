"""From a run file to the objects it names: encoder, loader, optimiser step. Shared by training and its dry run."""

import copy
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlkit.config import AugmentSettings, RunConfig
from vlkit.contracts import Features, ImageTextBatch
from vlkit.data.caption_choice import CaptionChoice
from vlkit.data.epoch_plan import Plan
from vlkit.data.loader import Loader
from vlkit.data.rand_augment import RandAugment
from vlkit.data.replay import Replay
from vlkit.data.sample_reader import Failure
from vlkit.data.shard_index import ShardSet
from vlkit.data.transforms import Augment, Preprocess
from vlkit.distributed import launch, rank, world_size
from vlkit.errors import ConfigError, ModelError
from vlkit.losses import TERMS, LossOutput, Objective
from vlkit.losses.patch_alignment import PATCH_TOKENS
from vlkit.losses.sigmoid import START_LOGIT_BIAS, START_LOGIT_SCALE
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.export import as_open_clip
from vlkit.models.layers import tower_modules
from vlkit.models.load import load_encoder, pick_device
from vlkit.models.patch_dropout import PatchDropout
from vlkit.models.tokenizers import TextTokenizer
from vlkit.run_sections import PatchAlignmentSettings
from vlkit.training.ema import Ema
from vlkit.training.heads import head_term
from vlkit.training.loop import Pace
from vlkit.training.optim import make_optimizer
from vlkit.training.schedules import make_schedule
from vlkit.training.sharded import shard
from vlkit.training.stages import PATCH_DRAWS
from vlkit.training.teacher import Teacher
from vlkit.training.trainable import compile_blocks, lr_scales, prepare

# What the batches of the loader hold beyond what the encoder gives.
DATA_GIVES = frozenset({"caption_hash", "ids", "text_to_image", "valid"})

_MOST_WORKERS = 16


class Learner(NamedTuple):
    """What is trained, and by what."""

    encoder: DualEncoder
    module: "PretrainStep"
    optimizer: torch.optim.Optimizer
    twin: DualEncoder | None = None  # whole, on the CPU, where FSDP spreads the encoder's weights; see view.py
    ema: Ema | None = None
    teacher: Teacher | None = None

    @property
    def kept(self) -> nn.Module:
        """What a checkpoint holds beside the encoder and the optimiser: state of the losses, averaged weights."""
        return nn.ModuleDict({"objective": self.module.objective} | ({"ema": self.ema} if self.ema else {}))


class Course(NamedTuple):
    """How long training goes on, and how fast it learns."""

    steps: int
    pace: Pace
    schedule: Callable[[int], float]  # step -> learning rate
    warmup: int  # steps


class PretrainStep(nn.Module):
    """Encoder and objective in one module, so that wrappers for several processes see one forward.

    Args:
        encoder: images and texts to features.
        objective: features to losses.
        precision: "bf16" runs the encoder under autocast; the losses are float32 in any case.
        patch_dropout: part of the encoder; leaves out patches where the batch brings numbers for that.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        objective: Objective,
        precision: Literal["fp32", "bf16"] = "fp32",
        patch_dropout: PatchDropout | None = None,
    ) -> None:
        super().__init__()
        self._patch_dropout = [patch_dropout] if patch_dropout else []  # in a list: it is a module of the encoder
        self.encoder = encoder
        self.objective = objective
        self.precision = precision
        self.channels_last = has_overlapping_convolutions(encoder)
        self.local = any(PATCH_TOKENS in term.needs for term in objective.terms.values())  # type: ignore[operator]

    def forward(self, batch: ImageTextBatch, step: int) -> LossOutput:
        """The losses of a batch that is on the encoder's device."""
        output: LossOutput = self.objective(self.features(batch), batch, step)
        return output

    def features(self, batch: ImageTextBatch) -> Features:
        """The features of a batch that is on the encoder's device."""
        if self.channels_last:
            batch = batch._replace(images=batch.images.contiguous(memory_format=torch.channels_last))
        device, bf16 = self.encoder.device, self.precision == "bf16"
        for dropout in self._patch_dropout:
            dropout.draws = batch.extra.get(PATCH_DRAWS)
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16), _attention_for(device, bf16):
                features: Features = self.encoder(batch, local=True) if self.local else self.encoder(batch)
        finally:
            for dropout in self._patch_dropout:
                dropout.draws = None
        return features


def _attention_for(device: torch.device, bf16: bool) -> AbstractContextManager[None]:
    """On a CPU the fused attention's backward in bf16 takes 1.6 times as long as the plain one on short texts."""
    if device.type == "cpu" and bf16:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def choose_device(run: RunConfig) -> torch.device:
    """The device of this process; with several processes on a machine each takes the GPU of its local number.

    Raises:
        ConfigError: there are fewer GPUs than processes on this machine.
    """
    device = pick_device(run.run.device)
    if device.type == "cuda" and run.run.device in {"auto", "cuda"}:
        number, count = launch().local_rank, torch.cuda.device_count()
        if number >= count:
            raise ConfigError(
                f"Process {number} on this machine has no GPU of its own: there are {count}. Start at most {count}."
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    return device


def choose_precision(run: RunConfig, device: torch.device) -> Literal["fp32", "bf16"]:
    """What `optim.precision` means on a device.

    Raises:
        ConfigError: bf16 was asked for, and the device cannot.
    """
    capable = _computes_bf16(device)
    if run.optim.precision == "bf16" and not capable:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the device {device}"
        raise ConfigError(f'optim.precision = "bf16", but {name} has no bf16. Use "fp32" or "auto".')
    if run.optim.precision == "auto":
        return "bf16" if device.type == "cuda" and capable else "fp32"
    return run.optim.precision


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        with torch.autocast(device.type, torch.bfloat16):  # which old releases of macOS refuse
            one = torch.ones(1, 1, device=device)
            return (one @ one).dtype == torch.bfloat16
    except (RuntimeError, TypeError):
        return False


def build_learner(run: RunConfig, device: torch.device) -> Learner:
    """Encoder, losses and optimiser of a run; random weights follow from `run.seed`.

    Raises:
        ModelError: an unknown architecture or model.
        ConfigError: a loss needs what neither the model nor the data gives, or a precision the device lacks.
    """
    encoder = _build_encoder(run)
    if "sigmoid" in run.loss.terms and encoder.logit_bias is None:
        encoder = with_bias(encoder)
    encoder = encoder.to(device)
    if has_overlapping_convolutions(encoder):
        encoder = encoder.to(memory_format=torch.channels_last)
    patch_dropout = prepare(encoder, run)
    train_mode(encoder, run)
    terms = {
        name: (
            term.weight,
            head_term(term, encoder, run.run.seed)
            if isinstance(term, PatchAlignmentSettings)
            else TERMS[name](**term.arguments),
        )
        for name, term in run.loss.terms.items()
    }
    teacher = _build_teacher(run, encoder)
    objective = Objective(terms, gives=encoder.gives | _data_gives(run) | {"teacher"})
    module = PretrainStep(encoder, objective, choose_precision(run, device), patch_dropout)
    twin = None
    if run.run.parallel == "fsdp" and world_size() > 1:
        twin = copy.deepcopy(encoder).to("cpu")
        shard(encoder)
    optimizer = make_optimizer(module, run.optim, lr_scales(module, encoder, run), module.precision)
    ema = None if run.optim.ema is None else Ema(encoder, run.optim.ema)
    if run.model.compile:
        compile_blocks(encoder)
    return Learner(encoder, module, optimizer, twin, ema, teacher)


def _build_teacher(run: RunConfig, student: DualEncoder) -> Teacher | None:
    if run.loss.distillation is None or run.loss.distillation.teacher is None:
        return None
    encoder = load_encoder(run.loss.distillation.teacher).to(student.device)
    return Teacher(encoder, student, rows_at_a_time(run))


def with_bias(encoder: DualEncoder) -> DualEncoder:
    """The same weights with a logit bias, and bias and scale where training with a sigmoid loss starts.

    Raises:
        ConfigError: this kind of encoder takes no bias.
    """
    from vlkit.models.open_clip_encoder import OpenClipEncoder, construct

    if not isinstance(encoder, OpenClipEncoder):
        raise ConfigError(
            f"loss.sigmoid needs a logit_bias, which this {type(encoder).__name__} lacks and cannot be given. Start "
            "from SigLIP weights, or from a model on open_clip."
        )
    biased = construct(encoder.architecture.with_changes(init_logit_bias=START_LOGIT_BIAS), encoder.tokenize.folder)
    bias = biased.weights()["logit_bias"]
    biased.model.load_state_dict({**encoder.weights(), "logit_bias": bias})
    biased.log_scale.data.fill_(math.log(START_LOGIT_SCALE))
    return biased


def has_overlapping_convolutions(module: nn.Module) -> bool:
    """Whether a tower convolves beyond cutting patches. Such a one is a quarter faster with channels laid out last
    (a small ResNet on a CPU: 0.38 s against 0.51 s); one that only cuts patches is not."""
    convolutions = [child for child in module.modules() if isinstance(child, nn.Conv2d)]
    return any(child.kernel_size != child.stride and max(child.kernel_size) > 1 for child in convolutions)


def train_mode(encoder: DualEncoder, run: RunConfig) -> None:
    """Training mode, but for frozen towers: their batch statistics stay as they are."""
    encoder.train()
    for tower in run.model.freeze:
        for module in tower_modules(encoder, tower).values():
            module.eval()


def plan_course(run: RunConfig, steps_per_epoch: int) -> Course:
    """Number of steps (at least one) and learning rates of a run."""
    batch_size = run.data.global_batch_size
    steps = max(1, run.run.length.in_steps(total=0, steps_per_epoch=steps_per_epoch, batch_size=batch_size))
    schedule = make_schedule(run.optim, steps=steps, steps_per_epoch=steps_per_epoch, batch_size=batch_size)
    warmup = run.optim.warmup.in_steps(total=steps, steps_per_epoch=steps_per_epoch, batch_size=batch_size)
    return Course(steps, Pace(batch_size, steps_per_epoch), schedule, warmup)


def build_loader(
    run: RunConfig,
    shards: ShardSet,
    encoder: DualEncoder,
    plan: Plan | None = None,
    captions: CaptionChoice | None = None,
    on_broken: Callable[[Sequence[Failure]], None] | None = None,
    preprocess: Preprocess | None = None,
    tokenize: TextTokenizer | None = None,
    replay: Replay | None = None,
) -> Loader:
    """The training batches of this process; `plan`, `captions`, `on_broken` and `replay` as for `Loader`.

    `preprocess` and `tokenize` are the encoder's where none are given.
    """
    return Loader(
        shards,
        tokenize or encoder.tokenize,
        batch_size=run.data.global_batch_size,
        preprocess=preprocess or encoder.preprocess,
        augment=make_augment(run.data.augment),
        second_view=make_augment(run.data.second_view),
        labels=run.data.labels,
        captions_per_image=run.data.captions_per_image,
        token_dropout=run.data.token_dropout,
        window=run.data.window,
        seed=run.run.seed,
        workers=num_workers(run, encoder.device),
        rank=rank(),
        world_size=world_size(),
        max_bad_fraction=run.data.max_bad_fraction,
        plan=plan,
        captions=captions,
        on_broken=on_broken,
        replay=replay,
    )


def _data_gives(run: RunConfig) -> frozenset[str]:
    """What the batches of a run hold beyond what the encoder gives."""
    asked_for = {"second_view": run.data.second_view is not None, "labels": run.data.labels}
    return DATA_GIVES | {name for name, given in asked_for.items() if given}


def rows_at_a_time(run: RunConfig) -> int:
    """Images whose activations a process holds at once."""
    share = run.data.global_batch_size // world_size()
    return min(share, run.data.chunk_size or share)


def num_workers(run: RunConfig, device: torch.device) -> int:
    """Decoding processes for this training process: on a GPU the cores it leaves idle, on a CPU one."""
    if isinstance(run.data.workers, int):
        return run.data.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // launch().local_world_size
    return min(max(share - 1, 0), 1 if device.type == "cpu" else _MOST_WORKERS)


def to_device(batch: ImageTextBatch, device: torch.device) -> ImageTextBatch:
    """The batch on a device. Images stay uint8: a quarter of the bytes to copy."""
    if device.type == "cpu":
        return batch
    moved = {name: getattr(batch, name).to(device, non_blocking=True) for name in _TENSORS}
    extra = {name: value.to(device, non_blocking=True) for name, value in batch.extra.items()}
    return batch._replace(**moved, extra=extra)


# `ids` and `keys` stay: they are for messages.
_TENSORS = ("images", "tokens", "text_to_image", "caption_hash", "valid")


def _build_encoder(run: RunConfig) -> DualEncoder:
    from vlkit.models.image_tower import with_trained_tower
    from vlkit.models.open_clip_encoder import build_encoder

    torch.manual_seed(run.run.seed)
    if run.model.init is not None:
        return _in_open_clip_form(load_encoder(run.model.init, image_size=run.data.image_size))
    architecture = run.model.architecture if run.model.name is None else run.model.name
    assert architecture is not None
    if run.model.init_image is not None:
        return with_trained_tower(architecture, run.model.init_image, image_size=run.data.image_size)
    return build_encoder(architecture, image_size=run.data.image_size)


def _in_open_clip_form(encoder: DualEncoder) -> DualEncoder:
    """A CLIP model of transformers on open_clip, where there is a way into its towers; any other as it is.

    One that open_clip cannot hold, and every SigLIP of transformers, is trained as it is.
    """
    try:
        return as_open_clip(encoder)
    except ModelError:
        return encoder


def make_augment(settings: AugmentSettings | None) -> Augment | None:
    """The random changes that [data.augment] describes."""
    if settings is None:
        return None
    rand_augment = None if settings.rand_augment is None else RandAugment(**settings.rand_augment.model_dump())
    return Augment(**settings.model_dump(exclude={"rand_augment"}), rand_augment=rand_augment)
