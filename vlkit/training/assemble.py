"""From a run file to the objects it names: encoder, loader, optimiser step. Shared by training and its dry run."""

import math
import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlkit.config import AugmentSettings, RunConfig
from vlkit.contracts import Features, ImageTextBatch
from vlkit.data.loader import Loader
from vlkit.data.shard_index import ShardSet
from vlkit.data.transforms import Augment
from vlkit.distributed import rank, world_size
from vlkit.errors import ConfigError
from vlkit.losses import TERMS, LossOutput, Objective
from vlkit.losses.sigmoid import START_LOGIT_BIAS, START_LOGIT_SCALE
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.load import load_encoder, pick_device
from vlkit.training.loop import Pace
from vlkit.training.optim import make_optimizer, make_schedule

# Where the parameters and modules of each tower are found, in an encoder or in the model it wraps.
TOWERS = {"image": "visual", "text": "text"}

# What the batches of the loader hold beyond what the encoder gives.
DATA_GIVES = frozenset({"caption_hash", "ids", "text_to_image", "valid"})

_MOST_WORKERS = 16


class Learner(NamedTuple):
    """What is trained, and by what."""

    encoder: DualEncoder
    module: "PretrainStep"
    optimizer: torch.optim.Optimizer


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
    """

    def __init__(self, encoder: DualEncoder, objective: Objective, precision: Literal["fp32", "bf16"] = "fp32") -> None:
        super().__init__()
        self.encoder = encoder
        self.objective = objective
        self.precision = precision
        self.channels_last = has_overlapping_convolutions(encoder)

    def forward(self, batch: ImageTextBatch, step: int) -> LossOutput:
        """The losses of a batch that is on the encoder's device."""
        output: LossOutput = self.objective(self.features(batch), batch, step)
        return output

    def features(self, batch: ImageTextBatch) -> Features:
        """The features of a batch that is on the encoder's device."""
        if self.channels_last:
            batch = batch._replace(images=batch.images.contiguous(memory_format=torch.channels_last))
        device, bf16 = self.encoder.device, self.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16), _attention_for(device, bf16):
            features: Features = self.encoder(batch)
        return features


def _attention_for(device: torch.device, bf16: bool) -> AbstractContextManager[None]:
    """On a CPU the fused attention's backward in bf16 takes 1.6 times as long as the plain one on short texts."""
    if device.type == "cpu" and bf16:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def choose_device(run: RunConfig) -> torch.device:
    """The device of this process; with several processes on a machine each takes the GPU of its local number."""
    device = pick_device(run.run.device)
    if device.type == "cuda" and run.run.device in {"auto", "cuda"}:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


def join_processes(device: torch.device) -> bool:
    """Join the other processes when `torchrun` started several; whether it did so here."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return False
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return True


def choose_precision(run: RunConfig, device: torch.device) -> Literal["fp32", "bf16"]:
    """What `optim.precision` means on a device.

    Raises:
        ConfigError: bf16 was asked for, and the device cannot.
    """
    capable = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if run.optim.precision == "bf16" and not capable:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f'optim.precision = "bf16", but {name} has no bf16. Use "fp32" or "auto".')
    if run.optim.precision == "auto":
        return "bf16" if device.type == "cuda" and capable else "fp32"
    return run.optim.precision


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
    for tower in run.model.freeze:
        tower_module(encoder, tower).requires_grad_(False)
    if "sigmoid" not in run.loss.terms:
        _freeze_bias(encoder)
    train_mode(encoder, run)
    terms = {
        name: (term.weight, TERMS[name](**term.model_dump(exclude={"weight"}))) for name, term in run.loss.terms.items()
    }
    objective = Objective(terms, gives=encoder.gives | DATA_GIVES)
    module = PretrainStep(encoder, objective, choose_precision(run, device))
    return Learner(encoder, module, make_optimizer(module, run.optim))


def with_bias(encoder: DualEncoder) -> DualEncoder:
    """The same weights with a logit bias, and bias and scale where training with a sigmoid loss starts.

    Raises:
        ConfigError: this kind of encoder takes no bias.
    """
    from vlkit.models.open_clip_encoder import OpenClipEncoder, construct

    if not isinstance(encoder, OpenClipEncoder):
        raise ConfigError(
            f"loss.sigmoid needs a logit_bias, which this {type(encoder).__name__} lacks. Start from SigLIP weights."
        )
    biased = construct(encoder.architecture.with_changes(init_logit_bias=START_LOGIT_BIAS), encoder.tokenize.folder)
    bias = biased.weights()["logit_bias"]
    biased.model.load_state_dict({**encoder.weights(), "logit_bias": bias})
    biased.log_scale.data.fill_(math.log(START_LOGIT_SCALE))
    return biased


def _freeze_bias(encoder: DualEncoder) -> None:
    """A softmax loss does not see the bias, and wrappers for several processes ask for every gradient."""
    for name, parameter in encoder.named_parameters():
        if name.rpartition(".")[2] == "logit_bias":
            parameter.requires_grad_(False)


def has_overlapping_convolutions(module: nn.Module) -> bool:
    """Whether a tower convolves beyond cutting patches. Such a one is a quarter faster with channels laid out last
    (a small ResNet on a CPU: 0.38 s against 0.51 s); one that only cuts patches is not."""
    convolutions = [child for child in module.modules() if isinstance(child, nn.Conv2d)]
    return any(child.kernel_size != child.stride and max(child.kernel_size) > 1 for child in convolutions)


def train_mode(encoder: DualEncoder, run: RunConfig) -> None:
    """Training mode, but for frozen towers: their batch statistics stay as they are."""
    encoder.train()
    for tower in run.model.freeze:
        tower_module(encoder, tower).eval()


def tower_module(encoder: nn.Module, tower: Literal["image", "text"]) -> nn.Module:
    """The module that holds a tower's weights."""
    names = (f"model.{TOWERS[tower]}", TOWERS[tower])
    found: list[nn.Module] = [module for name, module in encoder.named_modules() if name in names]
    assert len(found) == 1, f"{type(encoder).__name__} has {len(found)} modules named {' or '.join(names)}"
    return found[0]


def plan_course(run: RunConfig, steps_per_epoch: int) -> Course:
    """Number of steps (at least one) and learning rates of a run."""
    batch_size = run.data.global_batch_size
    steps = max(1, run.run.length.in_steps(total=0, steps_per_epoch=steps_per_epoch, batch_size=batch_size))
    schedule = make_schedule(run.optim, steps=steps, steps_per_epoch=steps_per_epoch, batch_size=batch_size)
    warmup = run.optim.warmup.in_steps(total=steps, steps_per_epoch=steps_per_epoch, batch_size=batch_size)
    return Course(steps, Pace(batch_size, steps_per_epoch), schedule, warmup)


def build_loader(run: RunConfig, shards: ShardSet, encoder: DualEncoder) -> Loader:
    """The training batches of this process."""
    return Loader(
        shards,
        encoder.tokenize,
        batch_size=run.data.global_batch_size,
        preprocess=encoder.preprocess,
        augment=_augment(run.data.augment),
        captions_per_image=run.data.captions_per_image,
        token_dropout=run.data.token_dropout,
        seed=run.run.seed,
        workers=num_workers(run, encoder.device),
        rank=rank(),
        world_size=world_size(),
        max_bad_fraction=run.data.max_bad_fraction,
    )


def rows_at_a_time(run: RunConfig) -> int:
    """Images whose activations a process holds at once."""
    share = run.data.global_batch_size // world_size()
    return min(share, run.data.chunk_size or share)


def num_workers(run: RunConfig, device: torch.device) -> int:
    """Decoding processes for this training process: on a GPU the cores it leaves idle, on a CPU one."""
    if isinstance(run.data.workers, int):
        return run.data.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(share - 1, 0), 1 if device.type == "cpu" else _MOST_WORKERS)


def batches_from(loader: Loader, step: int) -> Generator[ImageTextBatch, None, None]:
    """The batches after `step` steps, epoch after epoch without end."""
    epoch, index = loader.plan.position(step)
    while True:
        yield from loader.epoch(epoch, start=index)
        epoch, index = epoch + 1, 0


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
    from vlkit.models.open_clip_encoder import build_encoder

    torch.manual_seed(run.run.seed)
    if run.model.init is not None:
        return load_encoder(run.model.init, image_size=run.data.image_size)
    architecture = run.model.architecture if run.model.name is None else run.model.name
    assert architecture is not None
    return build_encoder(architecture, image_size=run.data.image_size)


def _augment(settings: AugmentSettings | None) -> Augment | None:
    return None if settings is None else Augment(**settings.model_dump())
