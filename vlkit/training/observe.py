"""What a run measures of itself beside the loss: how well the batch is told apart, arithmetic, memory, spikes."""

import json
import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlkit.contracts import Features, ImageTextBatch
from vlkit.distributed import Spread, gather_objects, is_main, world_size
from vlkit.losses.base import share_of
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.patch_dropout import PatchDropout
from vlkit.training.assemble import Learner
from vlkit.training.loop import Moment

# Accuracy and norms are taken so often: each costs about as much as the loss, or a pass over the parameters.
OFTEN = 10

# Dense bf16 and fp32 (TF32 where it is on by default: nowhere) in 1e12 operations a second, by part of the name.
# Source: the makers' data sheets.
PEAK_TFLOPS = {
    "H200": {"bf16": 989.0, "fp32": 67.0},
    "H100 PCIe": {"bf16": 756.0, "fp32": 51.0},
    "H100 NVL": {"bf16": 835.0, "fp32": 60.0},
    "H100": {"bf16": 989.0, "fp32": 67.0},
    "B200": {"bf16": 2250.0, "fp32": 75.0},
    "A100": {"bf16": 312.0, "fp32": 19.5},
    "A10": {"bf16": 125.0, "fp32": 31.2},
    "L40S": {"bf16": 362.0, "fp32": 91.6},
    "L4": {"bf16": 121.0, "fp32": 30.3},
    "RTX 4090": {"bf16": 165.2, "fp32": 82.6},
    "RTX 3090": {"bf16": 71.0, "fp32": 35.6},
}


class Accuracy:
    """Share of the images whose own text comes first among all texts of the batch, over all processes.

    Call `start(step)` before each step; `watched()` gives {"contrastive_accuracy": ()} after those that are due.

    Args:
        objective: what the features of the whole batch are given to, whether in chunks or not.
        every: steps.
    """

    def __init__(self, objective: nn.Module, every: int = OFTEN) -> None:
        self._every, self._due = every, False
        self._seen: tuple[Features, Tensor] | None = None
        objective.register_forward_hook(self._keep)

    def start(self, step: int) -> None:
        """Before step `step`, counted from 0."""
        self._due = (step + 1) % self._every == 0

    def watched(self) -> dict[str, Tensor]:
        """The accuracy of the step just done; nothing where it is not due."""
        if self._seen is None:
            return {}
        (features, valid), self._seen = self._seen, None
        return {"contrastive_accuracy": contrastive_accuracy(features, valid)}

    def _keep(self, objective: nn.Module, arguments: tuple[Any, ...], output: object) -> None:
        if self._due:
            features, batch, *_ = arguments
            self._seen = (features, batch.valid)


@torch.no_grad()
def contrastive_accuracy(features: Features, valid: Tensor, tile: int = 1 << 22) -> Tensor:
    """() share of the valid images, over all processes, whose best text is one of their own. 0 without any.

    Args:
        features: of this process's rows.
        valid: (B,) bool.
        tile: at most so many similarities at a time.
    """
    share = share_of(features.image, features.text, features.text_to_image, valid, None, None, True)
    texts = share.texts.gather(share.text.contiguous())
    right = torch.zeros(2, device=texts.device)
    if len(texts):
        rows = max(1, tile // len(texts))
        for start in range(0, len(share.image), rows):
            best = (share.image[start : start + rows].to(texts) @ texts.T).argmax(1)
            place = torch.arange(start, start + len(best), device=best.device)
            right[0] += (share.own[best] == place).sum()
    right[1] = len(share.image)
    Spread(share.texts.counts, share.texts.rank).sum(right)
    return right[0] / right[1].clamp(min=1)


def count_flops(encoder: DualEncoder, batch: ImageTextBatch) -> float:
    """Floating point operations of the encoder for one image with its texts, forward and backward.

    Measured on two images of the batch and texts of its length. Forward passes that are done again to save memory do
    not count, nor does the loss. Random numbers and batch statistics stay as they are.

    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B (model FLOPs utilisation).
    """
    device, modes = encoder.device, [(module, module.training) for module in encoder.modules()]
    texts = max(1, round(2 * len(batch.tokens) / len(batch.images)))
    images = batch.images[:2].to(device)
    tokens = batch.tokens[:1].expand(texts, -1).to(device)
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    # Patch dropout is part of the work; batch statistics are not to change.
    encoder.train(getattr(encoder, "drops_patches", False))
    dropouts = [module for module in encoder.modules() if isinstance(module, PatchDropout)]
    for dropout in dropouts:
        dropout.draws = torch.arange(2)
    try:
        with (
            torch.compiler.set_stance("force_eager"),  # compiled blocks cannot be looked into
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),  # fused attention on a CPU is not counted
            FlopCounterMode(display=False) as counter,
        ):
            total = encoder.encode_image(images).sum() + encoder.encode_text(tokens).sum()
            if trained:  # none where a head alone is
                torch.autograd.grad(total, trained, allow_unused=True)
    finally:
        for module, mode in modes:
            module.training = mode
        for dropout in dropouts:
            dropout.draws = None
    return float(counter.get_total_flops()) / len(images)


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """1e12 operations a second that a device can do at best; None where the table does not have it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peaks[precision] for part, peaks in PEAK_TFLOPS.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: of tensors on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Costs:
    """Arithmetic and memory of each step, for metrics.jsonl. Arithmetic is counted once for each size of images.

    Args:
        learner: whose encoder is counted.
        device: of this process.
        peak: 1e12 operations a second of one device; default: from the table; unknown: no MFU.
    """

    def __init__(self, learner: Learner, device: torch.device, peak: float | None) -> None:
        self._encoder = learner.twin or learner.encoder
        self._device, self._peak = device, peak or peak_tflops(device, learner.module.precision)
        self._flops: dict[int, float] = {}
        self._size = 0

    def see(self, batches: Iterable[ImageTextBatch]) -> Iterator[ImageTextBatch]:
        """The same batches."""
        for batch in batches:
            self._size = batch.images.shape[-1]
            if self._size not in self._flops:
                self._flops[self._size] = count_flops(self._encoder, batch)
            yield batch

    def __call__(self, moment: Moment) -> dict[str, float]:
        """Values of one step; speed is that of one device."""
        tflops = self._flops[self._size] * moment.samples_per_second / world_size() / 1e12
        found: dict[str, float] = {"tflops": tflops, "peak_memory": peak_memory(self._device)}
        return found if self._peak is None else {**found, "mfu": tflops / self._peak}


class SpikeLog:
    """Writes steps whose loss jumps, with the samples of the batch, to spikes.jsonl. All processes call it.

    Args:
        path: the file; it is made with the first spike.
        window: so many steps before are the measure.
        sigmas: a spike is so many standard deviations above their mean.
    """

    def __init__(self, path: Path, window: int = 100, sigmas: float = 6.0) -> None:
        self._path, self._sigmas = path, sigmas
        self._losses: deque[float] = deque(maxlen=window)

    def __call__(self, moment: Moment) -> None:
        """Look at one step."""
        losses, enough = self._losses, len(self._losses) >= 20
        mean, deviation = (statistics.fmean(losses), statistics.pstdev(losses)) if enough else (0.0, 0.0)
        losses.append(moment.loss)
        if not enough or moment.loss <= mean + self._sigmas * max(deviation, 1e-3 * abs(mean)):
            return
        # The loss is the same in all processes, so all of them come here.
        keys = [key for share in gather_objects(list(moment.keys)) for key in share]
        if is_main():
            line = {"step": moment.step, "loss": moment.loss, "mean": mean, "deviation": deviation}
            self._append({**line, "grad_norm": moment.grad_norm, "keys": keys})

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
