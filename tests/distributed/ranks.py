"""Runs under torchrun: each case on all processes against the same batch on one; writes what differs.

    torchrun --nproc-per-node=2 tests/distributed/ranks.py OUT.json
    python tests/distributed/ranks.py OUT.json 4

The second form is torchrun's own launcher with processes that are forked, so that they share what is imported.
Every process builds the whole batch and the model, computes loss and gradients alone, then takes its share of the
batch and does the same together with the others. The model is a tiny DualEncoder in float64.
"""

import gc
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from vlkit.config import OptimSettings
from vlkit.contracts import ImageTextBatch
from vlkit.data.transforms import Preprocess
from vlkit.distributed import gather_rows
from vlkit.losses import ClipLoss, Objective, SigmoidLoss, clip_loss, sigmoid_loss
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.tokenizers import TextTokenizer
from vlkit.training.cached import CachedStep, EncodeStep
from vlkit.training.optim import make_optimizer
from vlkit.training.parallel import on_ranks
from vlkit.training.sharded import placed_like, shard, total_norm, whole

CPU = torch.device("cpu")
IMAGES, WIDTH, PIXELS, WORDS = 16, 6, 4, 5
GIVES = frozenset({"image", "text", "logit_bias"})


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.inner(x))


class TinyEncoder(DualEncoder):
    """Two small networks, a scale and a bias, with one list of blocks that FSDP shards one by one."""

    text_tower = vision_tower = property(lambda self: None)

    def __init__(self) -> None:
        preprocess = Preprocess(PIXELS)
        tokenize = TextTokenizer("clip", WORDS)
        super().__init__(embed_dim=WIDTH, image_size=PIXELS, preprocess=preprocess, tokenize=tokenize, gives=GIVES)
        self.first = nn.Linear(3 * PIXELS**2, WIDTH)
        self.blocks = nn.ModuleList([Block(WIDTH), Block(WIDTH)])
        self.words = nn.Embedding(20, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.scale, self.bias = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(-2.0))

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        x = self.first(self.normalize_pixels(images).flatten(1))
        for block in self.blocks:
            x = block(x)
        return F.normalize(x, dim=1) if normalize else x

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        x = self.last(self.words(tokens).mean(1).tanh())
        return F.normalize(x, dim=1) if normalize else x

    def logit_scale(self) -> Tensor:
        return self.scale.exp()

    @property
    def logit_bias(self) -> Tensor | None:
        return self.bias

    def record(self) -> dict[str, object]:
        return {}

    def weights(self) -> dict[str, Tensor]:
        return dict(self.state_dict())


class Model(nn.Module):
    """As PretrainStep: encoder and objective behind one forward."""

    def __init__(self, case: "Case") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = TinyEncoder().double()
        clip, sigmoid = ClipLoss("mask", case.tile_size), SigmoidLoss("mask", case.tile_size)
        terms = {"clip": (0.7, clip), "sigmoid": (1.3, sigmoid)}
        self.objective = Objective({name: terms[name] for name in case.losses.split("+")}, gives=GIVES)

    def forward(self, batch: ImageTextBatch, step: int) -> Tensor:
        # The sum with zero keeps the bias in the graph where only the softmax loss is used: DDP asks for that.
        return self.objective(self.encoder(batch), batch, step).total + 0.0 * self.encoder.bias


class Case(NamedTuple):
    losses: str
    data: str
    how: str
    chunks: int
    tile_size: int


def make_batch(data: str, world: int) -> ImageTextBatch:
    """The whole batch. Captions and images have duplicates on other ranks, texts lie in no order."""
    made = torch.Generator().manual_seed(1)
    own, valid = torch.arange(IMAGES), torch.ones(IMAGES, dtype=torch.bool)
    if data != "plain":
        own = own.repeat_interleave(torch.tensor([1, 3, 0, 2] * (IMAGES // 4)))
        valid[[1, IMAGES - 3]] = False
    if data == "one rank has nothing":
        valid[: IMAGES // world] = False
    return ImageTextBatch(
        images=torch.randint(0, 256, (IMAGES, 3, PIXELS, PIXELS), generator=made, dtype=torch.uint8),
        tokens=torch.randint(0, 20, (len(own), WORDS), generator=made),
        text_to_image=own,
        ids=torch.arange(IMAGES) % (IMAGES - 2),
        caption_hash=torch.randint(0, 12, (len(own),), generator=made),
        valid=valid,
        extra={},
        keys=[str(i) for i in range(IMAGES)],
    )


def share(batch: ImageTextBatch, rank: int, world: int) -> ImageTextBatch:
    """The rows of one process; its texts in reverse order."""
    rows = slice(rank * IMAGES // world, (rank + 1) * IMAGES // world)
    own = batch.text_to_image
    texts = ((own >= rows.start) & (own < rows.stop)).nonzero()[:, 0].flip(0)
    return ImageTextBatch(
        images=batch.images[rows],
        tokens=batch.tokens[texts],
        text_to_image=own[texts] - rows.start,
        ids=batch.ids[rows],
        caption_hash=batch.caption_hash[texts],
        valid=batch.valid[rows],
        extra={},
        keys=batch.keys[rows],
    )


def alone(model: Model, batch: ImageTextBatch) -> Tensor:
    """Loss and gradients of the whole batch, without the other processes."""
    image, text, own, scale, bias, *_ = model.encoder(batch)
    keys = {"same_caption": batch.caption_hash, "same_image": batch.ids}
    total = 0.0 * bias
    if "clip" in model.objective.weights:
        total = total + 0.7 * clip_loss(image, text, scale, own, batch.valid, **keys)
    if "sigmoid" in model.objective.weights:
        total = total + 1.3 * sigmoid_loss(image, text, scale, bias, own, batch.valid, **keys)
    total.backward()
    return total.detach()


def together(case: Case, model: Model, batch: ImageTextBatch) -> Tensor:
    """Loss and gradients of one process's share, through the wrapper and, with chunks, the cached step."""
    if case.how == "fsdp":
        shard(model.encoder)
    if case.chunks == 1:
        parallel = on_ranks(model, case.how, CPU)
        with parallel.sync(True):
            total = parallel.model(batch, 0)
            total.backward()
    else:
        encode = EncodeStep(model.encoder, lambda part: with_all_parameters(model.encoder, part))
        parallel = on_ranks(encode, case.how, CPU)
        chunk_size = -(-len(batch.images) // case.chunks)
        total = CachedStep(parallel.model, model.objective, chunk_size, CPU, sync=parallel.sync)(batch, 0).total
    parallel.finish(model.parameters())
    return total.detach()


def with_all_parameters(encoder: TinyEncoder, batch: ImageTextBatch):
    features = encoder(batch)
    return features._replace(logit_scale=features.logit_scale + 0.0 * encoder.bias)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


def cases(world: int) -> Iterator[Case]:
    """One, two and four chunks, both losses, both ways; everything else that matters on two processes."""
    big = 1 << 22
    for losses, how, chunks in itertools.product(("clip", "sigmoid"), ("ddp", "fsdp"), (1, 2, 4)):
        yield Case(losses, "ragged", how, chunks, big)
    if world > 2:
        return
    for data, how, chunks in itertools.product(("plain", "one rank has nothing"), ("ddp", "fsdp"), (1, 2)):
        yield Case("clip+sigmoid", data, how, chunks, big)
    for losses, how in itertools.product(("clip", "sigmoid"), ("ddp", "fsdp")):
        yield Case(losses, "ragged", how, 1, tile_size=24)  # several tiles


def largest_difference(case: Case, rank: int, world: int) -> float:
    batch = make_batch(case.data, world)
    expected, found = Model(case), Model(case)
    loss = alone(expected, batch)
    value = together(case, found, share(batch, rank, world))
    worst = abs(value - loss).item()
    reference = gradients(expected)
    norms = [total_norm([parameter.grad for parameter in model.parameters()]) for model in (expected, found)]
    worst = max(worst, abs(norms[0] - norms[1]).item())
    for name, gradient in gradients(found).items():
        assert name == "encoder.bias" or reference[name].abs().max() > 1e-6, f"{case}: nothing to compare for {name}"
        worst = max(worst, (gradient - reference[name]).abs().max().item())
    return worst


def gathered_rows(rank: int, world: int) -> float:
    """`gather_rows` against the same rows on one process."""
    made = torch.randn(3 * world, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = torch.arange(6.0 * world, dtype=torch.float64).view(-1, 2)
    mine = made[3 * rank : 3 * rank + 3].clone().requires_grad_()
    ((gather_rows(mine) ** 2) * weights).sum().backward()
    expected = (2 * made * weights)[3 * rank : 3 * rank + 3]
    return (mine.grad / world - expected).abs().max().item()


def muon_steps() -> float:
    """Three steps of Muon on parameters that FSDP spreads, against the same on whole ones."""
    models = [TinyEncoder().double() for _ in range(2)]
    for parameter in models[0].parameters():  # the same on every process
        made = torch.Generator().manual_seed(parameter.numel())
        parameter.data = torch.randn(parameter.shape, generator=made, dtype=torch.float64)
    models[1].load_state_dict(models[0].state_dict())
    shard(models[1])
    settings = OptimSettings(name="muon", lr=0.1, weight_decay=0.5, matrix_lr=0.3)
    for model in models:
        optimizer = make_optimizer(model, settings)
        assert sum(len(group["params"]) for group in optimizer.param_groups if group["muon"]) == 2
        for step in range(3):
            for parameter in model.parameters():
                made = torch.Generator().manual_seed(step + parameter.numel())
                gradient = torch.randn(parameter.shape, generator=made, dtype=torch.float64)
                parameter.grad = placed_like(gradient, parameter)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * group["lr_scale"]
            optimizer.step()
    pairs = zip(*(model.parameters() for model in models), strict=True)
    return max((a - whole(b)).abs().max().item() for a, b in pairs)


def main(out: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {" | ".join(map(str, case)): largest_difference(case, rank, world) for case in cases(world)}
    found["gather_rows"] = gathered_rows(rank, world)
    found["muon"] = muon_steps()
    worst = torch.tensor(list(found.values()), dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if rank == 0:
        Path(out).write_text(json.dumps(dict(zip(found, worst.tolist(), strict=True))))
    gc.collect()  # sharded modules are cycles that hold groups, whose threads have to end before the groups do
    dist.barrier()
    dist.destroy_process_group()


def launch_forked(world: int, out: str) -> None:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        run_id="ranks",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        start_method="fork",
        max_restarts=0,
    )
    elastic_launch(config, main)(out)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        launch_forked(int(sys.argv[2]), sys.argv[1])
    else:
        main(sys.argv[1])
