"""What a run would be, found out by building everything and training on one batch: `vlkit train RUN --dry-run`."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlkit.config import RunConfig
from vlkit.contracts import ImageTextBatch
from vlkit.data.caption_choice import CaptionChoice
from vlkit.data.replay import Replay
from vlkit.data.sampling import GroupCount
from vlkit.data.shard_index import ShardSet
from vlkit.distributed import world_size
from vlkit.errors import DataError
from vlkit.models.dual_encoder import DualEncoder, parameters_per_tower
from vlkit.training import assemble, training_data
from vlkit.training.assemble import Learner

# On a CPU memory per image is measured on so many and multiplied: nobody waits for a batch of thousands there.
_MOST_ROWS_ON_CPU = 32


@dataclass(frozen=True)
class DataPlan:
    """The training data as found."""

    num_shards: int
    num_samples: int
    problem: str | None  # why there is none; the batch tried was made up then
    remainder: str = ""  # what becomes of the samples that fill no batch
    kind: str = "sources"  # or "classes"
    groups: Sequence[GroupCount] = ()  # what each source or class gives in an epoch


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device of one process."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept for backward, for a full batch of this process
    rows_measured: int  # images the activations were measured on
    rows: int  # images of a full batch of this process

    @property
    def total(self) -> int:
        """All together; work space of single operations comes on top."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Plan:
    """A run before it starts. None where it depends on data that was not found."""

    device: str
    precision: str
    num_processes: int
    num_workers: int
    parameters: Mapping[str, Mapping[str, int]]  # tower -> trainable, total
    data: DataPlan
    batch_size: int
    steps: int | None
    steps_per_epoch: int | None
    samples: int | None
    epochs: float | None
    warmup_steps: int | None
    lr: float
    memory: MemoryPlan
    loss: float  # of the one batch, with the weights of the start
    seconds: float  # it took, first-time costs included

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        plan = asdict(self)
        plan["memory"]["total"] = self.memory.total
        plan["data"]["groups"] = [group._asdict() for group in self.data.groups]
        return plan


def dry_run(run: RunConfig) -> Plan:
    """Build everything a run needs and train on one batch, without writing anything.

    Training data that is not there is no error: the batch is made up then, and the plan says so.

    Raises:
        ConfigError, ModelError: as in training.
    """
    device = assemble.choose_device(run)
    learner = assemble.build_learner(run, device)
    tried = _rows_to_try(run, device)
    try:
        found = training_data.open_data(run)
    except DataError as error:
        steps_per_epoch, data = None, DataPlan(0, 0, str(error))
        batch = _made_up_batch(learner.encoder, tried)
    else:
        planned, captions = training_data.plan_data(run, found), training_data.choose_captions(run, found)
        steps_per_epoch = planned.plan.num_batches
        shards = found.shards
        groups = planned.table(steps_per_epoch)
        data = DataPlan(len(shards.shards), shards.num_samples, None, planned.remainder, planned.kind, groups)
        stored = training_data.stored_teacher(run, shards)
        replay = None if stored is None else stored.replay
        batch = _real_batch(run, shards, learner.encoder, tried, captions, replay)
        batch = batch if stored is None else stored.teacher(batch)
    if learner.teacher is not None:
        batch = learner.teacher(batch)
    learner.module.objective.begin(
        num_samples=max(data.num_samples, tried), steps_per_epoch=steps_per_epoch or 1, steps=1, device=device
    )
    began = time.perf_counter()
    loss, kept = _train_on(learner, batch, run)
    seconds = time.perf_counter() - began
    rows = assemble.rows_at_a_time(run)
    if rows > tried:
        # Autocast keeps copies of the weights too, so what is kept is a line that does not pass through zero.
        _, kept_of_half = _train_on(learner, _first_half(batch), run)
        kept += (kept - kept_of_half) * (rows - tried) // (tried - tried // 2)
    steps = _steps(run, steps_per_epoch)
    return Plan(
        device=str(device),
        precision=learner.module.precision,
        num_processes=world_size(),
        num_workers=assemble.num_workers(run, device),
        parameters={name: count._asdict() for name, count in parameters_per_tower(learner.encoder).items()},
        data=data,
        batch_size=run.data.global_batch_size,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        samples=None if steps is None else steps * run.data.global_batch_size,
        epochs=None if steps is None or steps_per_epoch is None else steps / steps_per_epoch,
        warmup_steps=_warmup(run, steps, steps_per_epoch),
        lr=run.optim.lr,
        memory=_memory(learner, kept, tried, rows),
        loss=loss,
        seconds=seconds,
    )


def _rows_to_try(run: RunConfig, device: torch.device) -> int:
    rows = assemble.rows_at_a_time(run)
    return min(rows, _MOST_ROWS_ON_CPU) if device.type == "cpu" else rows


def _train_on(learner: Learner, batch: ImageTextBatch, run: RunConfig) -> tuple[float, int]:
    """The loss, and the bytes that forward kept for backward."""
    encoder, module, optimizer = learner.encoder, learner.module, learner.optimizer
    kept = _KeptBytes(module)
    torch.manual_seed(run.run.seed)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, _unchanged):
        output = module(assemble.to_device(batch, encoder.device), 0)
    output.total.backward()
    optimizer.step()
    return float(output.total.detach()), kept.total


class _KeptBytes:
    """Counts the tensors autograd keeps, each memory once, parameters and buffers not at all."""

    def __init__(self, module: nn.Module) -> None:
        self.total = 0
        self._keep_alive: list[Tensor] = []  # so that no address is used twice
        self._seen = {value.untyped_storage().data_ptr() for value in [*module.parameters(), *module.buffers()]}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._keep_alive.append(tensor.detach())
            self.total += storage.nbytes()
        return tensor


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _memory(learner: Learner, activations: int, rows_measured: int, rows: int) -> MemoryPlan:
    parameters = list(learner.module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    state = [value for values in learner.optimizer.state.values() for value in values.values()]
    return MemoryPlan(
        weights=_bytes([*parameters, *learner.module.buffers()]),
        gradients=_bytes(trained),
        optimizer=_bytes([value for value in state if isinstance(value, Tensor)]),
        activations=activations,
        rows_measured=rows_measured,
        rows=rows,
    )


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _steps(run: RunConfig, steps_per_epoch: int | None) -> int | None:
    if steps_per_epoch is None:
        if run.run.epochs is not None:
            return None
        steps_per_epoch = 1  # steps and samples do not depend on it
    return assemble.plan_course(run, steps_per_epoch).steps


def _warmup(run: RunConfig, steps: int | None, steps_per_epoch: int | None) -> int | None:
    warmup, pace = run.optim.warmup, steps_per_epoch
    if {"fraction": steps, "epochs": pace}.get(warmup.unit, 0) is None:
        return None
    return warmup.in_steps(total=steps or 0, steps_per_epoch=pace or 0, batch_size=run.data.global_batch_size)


def _real_batch(
    run: RunConfig,
    shards: ShardSet,
    encoder: DualEncoder,
    rows: int,
    captions: CaptionChoice | None,
    replay: Replay | None,
) -> ImageTextBatch:
    small = run.data.model_copy(update={"global_batch_size": rows * world_size(), "workers": 0})
    tried = run.model_copy(update={"data": small})
    with assemble.build_loader(tried, shards, encoder, None, captions, replay=replay) as loader:
        return next(loader.epoch(0))


def _first_half(batch: ImageTextBatch) -> ImageTextBatch:
    rows = len(batch.images) // 2
    texts = batch.text_to_image < rows
    return batch._replace(
        images=batch.images[:rows],
        tokens=batch.tokens[texts],
        text_to_image=batch.text_to_image[texts],
        ids=batch.ids[:rows],
        caption_hash=batch.caption_hash[texts],
        valid=batch.valid[:rows],
        extra={name: _half(name, value, rows, texts) for name, value in batch.extra.items()},
        keys=batch.keys[:rows],
    )


def _half(name: str, value: Tensor, rows: int, texts: Tensor) -> Tensor:
    if value.ndim == 0:
        return value
    return value[texts.to(value.device)] if name == "teacher_text" else value[:rows]


def _made_up_batch(encoder: DualEncoder, rows: int) -> ImageTextBatch:
    numbers = torch.arange(rows)
    size = encoder.image_size
    return ImageTextBatch(
        images=torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8),
        tokens=encoder.tokenize([f"a made-up caption of ordinary length, number {i}" for i in range(rows)]),
        text_to_image=numbers,
        ids=numbers,
        caption_hash=numbers,
        valid=torch.ones(rows, dtype=torch.bool),
        extra={},
        keys=[f"made up/{i}" for i in range(rows)],
    )
