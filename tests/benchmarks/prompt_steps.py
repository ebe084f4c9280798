"""Step time and memory of CoOp here and in a plain loop, in turn, on the same images, prompts and order.

    python tests/benchmarks/prompt_steps.py --model local-dir:tests/data/encoder --classes 100,1000 --steps 10

The plain loop is that of the authors' code: each step encodes its 32 images, and runs all prompts at the full context
length. Both start from one context; the losses of both are printed, and must agree.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.class_names import ClassName
from vlkit.addons.class_weights.coop import CoOp
from vlkit.addons.exchange import Vectors
from vlkit.addons.prompt_fit import frozen, parameter
from vlkit.addons.reference import Part, Reference
from vlkit.features.source import CachedEmbedder, open_source

BATCH, CONTEXT, LR = 32, 16, 0.002
FIRST = ("red", "old", "small", "round", "wild", "wooden", "tall", "grey", "young", "flat")
SECOND = ("boat", "house", "tree", "horse", "lamp", "bird", "bottle", "bridge", "flower", "car")


def names_of(count: int) -> tuple[ClassName, ...]:
    """Distinct names of two or three words."""
    words = [f"{one} {two}" for one in FIRST for two in SECOND]
    words += [f"{three} {word}" for three in FIRST for word in words]
    return tuple(ClassName(word, (word,)) for word in words[:count])


class Plain:
    """The authors' loop on the modules of the encoder."""

    def __init__(self, source: CachedEmbedder, names: tuple[ClassName, ...], images: Tensor, context: Tensor) -> None:
        encoder = source.embedder.encoder
        self.encoder, self.images, self.context = encoder, images, parameter(context)
        rows = encoder.tokenize([" ".join(["x"] * CONTEXT) + f" {item.shown}." for item in names])
        self.tokens = F.pad(rows, (0, encoder.context_length - rows.shape[1]))
        tower = encoder.text_tower
        with torch.no_grad():
            vectors = tower.token_vectors(self.tokens)
            self.positions = tower.embed(self.tokens[:1])[0] - vectors[0]
        self.before, self.after = vectors[:, :1], vectors[:, 1 + CONTEXT :]
        self.optimizer = torch.optim.SGD([self.context], LR, momentum=0.9, weight_decay=5e-4)

    def step(self, rows: Tensor, labels: Tensor) -> float:
        encoder, tower = self.encoder, self.encoder.text_tower
        with torch.no_grad():
            images = encoder.encode_image(self.images[rows])
        middle = self.context.expand(len(self.tokens), -1, -1)
        x = torch.cat([self.before, middle, self.after], dim=1) + self.positions
        for block in tower.blocks:
            x = block(x)
        features = F.normalize(tower.finish(x, self.tokens), dim=-1)
        loss = F.cross_entropy(encoder.logit_scale().detach() * images @ features.T, labels)
        return stepped(self.optimizer, loss)


class Ours:
    """`CoOp` with its cached features."""

    def __init__(self, source: CachedEmbedder, names: tuple[ClassName, ...], part: Part, context: Tensor) -> None:
        addon = CoOp(context=CONTEXT, lr=0.0, epochs=1, batch_size=len(part)).fit(
            Reference(class_names=names, few_shot=part, partial=True), source
        )
        task = addon.task(Reference(class_names=names, few_shot=part, partial=True), source, addon.examples(
            Reference(class_names=names, few_shot=part, partial=True)
        ))  # fmt: skip
        self.context = parameter(context)
        self.loss = addon.objective(task, {"vectors": self.context})
        self.optimizer = torch.optim.SGD([self.context], LR, momentum=0.9, weight_decay=5e-4)

    def step(self, rows: Tensor, labels: Tensor) -> float:
        return stepped(self.optimizer, self.loss(rows))


def stepped(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """The usual step."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def kept_for_backward(work: Callable[[], object]) -> float:
    """MiB of tensors that a step holds between forward and backward, each storage once."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    return sum(storages.values()) / 2**20


def measure(source: CachedEmbedder, classes: int, steps: int) -> None:
    """Print one line for each of the two."""
    random = torch.Generator().manual_seed(0)
    size = source.embedder.encoder.image_size
    images = torch.randint(0, 256, (256, 3, size, size), generator=random, dtype=torch.uint8)
    labels = torch.randint(0, classes, (256,), generator=random)
    names = names_of(classes)
    with torch.inference_mode():
        pooled = torch.cat([source.embedder.encoder.encode_image(part) for part in images.split(64)]).float()
    part = Part("train", Vectors("image", pooled.clone()), labels)
    width = source.embedder.encoder.text_tower.token_vectors(torch.zeros(1, 1, dtype=torch.int64)).shape[-1]
    context = 0.02 * torch.randn(CONTEXT, width, generator=random)
    both: dict[str, Plain | Ours] = {
        "plain loop": Plain(source, names, images, context),
        "vlkit": Ours(source, names, part, context),
    }
    times: dict[str, list[float]] = {name: [] for name in both}
    losses: dict[str, list[float]] = {name: [] for name in both}
    with frozen(source.embedder.encoder):
        for step in range(steps + 2):  # two to warm up
            rows = torch.randint(0, 256, (BATCH,), generator=random)
            for name, one in both.items():
                began = time.perf_counter()
                losses[name].append(one.step(rows, labels[rows]))
                if step >= 2:
                    times[name].append(time.perf_counter() - began)
        kept = {name: kept_for_backward(lambda one=one: one.step(rows, labels[rows])) for name, one in both.items()}  # type: ignore[misc]
    apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{classes} classes, {name}: {1000 * middle:.1f} ms a step, {kept[name]:.0f} MiB kept for backward")
    ratio = statistics.median(times["plain loop"]) / statistics.median(times["vlkit"])
    print(f"{classes} classes: {ratio:.2f}x; losses differ by {apart:.1e} at most over {steps + 2} steps")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="local-dir:tests/data/encoder")
    parser.add_argument("--classes", default="100,1000")
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    source = open_source(given.model, "cpu")
    for classes in (int(one) for one in given.classes.split(",")):
        measure(source, classes, given.steps)


if __name__ == "__main__":
    main()
