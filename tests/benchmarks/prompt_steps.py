"""Step time and memory of prompt learning here and in plain loops, in turn, on the same images, prompts and order.

    python tests/benchmarks/prompt_steps.py [--model local-dir:tests/data/encoder] [--classes 100,1000] [--steps 10]
    python tests/benchmarks/prompt_steps.py --model random:ViT-B-32 --classes 100 --steps 2 --warm-up 1

A plain loop is that of the authors' code on the modules of the same encoder: each step encodes its images anew and runs
all prompts at the full context length; batches are the authors' (CoOp 32, CoCoOp 1, MaPLe and PromptSRC 4, TPT one
image in 64 views, which both encode). Both start from the same values and draw the same images; their losses (TPT:
logits) must agree, and the largest difference is printed. Pixels are there already: decoding is not measured.
Memory is measured twice in a step: the tensors autograd keeps for backward, and how far resident memory rises.
"""

import argparse
import json
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from process_memory import peak_rise, saved_bytes
from torch import Tensor

from vlkit.addons.base import Fitted
from vlkit.addons.class_names import ClassName
from vlkit.addons.class_weights.cocoop import CoCoOp
from vlkit.addons.class_weights.coop import CoOp
from vlkit.addons.class_weights.tpt import Tpt
from vlkit.addons.exchange import ImageConditionedWeights, Vectors
from vlkit.addons.prompt_fit import frozen, parameter
from vlkit.addons.reference import Part, Reference
from vlkit.addons.text_prompts import TextPrompts
from vlkit.addons.towers.maple import Maple
from vlkit.addons.towers.prompt_src import PromptSrc
from vlkit.features.model_card import card_of
from vlkit.features.source import CachedEmbedder, open_source

POOL, VIEWS, TUNING_LR = 64, 64, 5e-3
MIB = 1 << 20
FIRST = ("red", "old", "small", "round", "wild", "wooden", "tall", "grey", "young", "flat")
SECOND = ("boat", "house", "tree", "horse", "lamp", "bird", "bottle", "bridge", "flower", "car")
Values = Mapping[str, Tensor]


class Method(NamedTuple):
    """With the authors' batch and rate."""

    addon: Any
    batch: int
    lr: float


METHODS = {
    "coop": Method(CoOp(context=16), 32, 0.002),
    "cocoop": Method(CoCoOp(), 1, 0.002),
    "maple": Method(Maple(crop=1.0), 4, 0.0035),
    "prompt_src": Method(PromptSrc(crop=1.0, templates="photo"), 4, 0.0025),
    "tpt": Method(Tpt(), 1, TUNING_LR),
}


class Case(NamedTuple):
    source: CachedEmbedder
    names: tuple[ClassName, ...]
    images: Tensor  # (N,3,S,S) uint8
    labels: Tensor  # (N,)
    part: Part  # their features

    @property
    def encoder(self) -> Any:
        return self.source.embedder.encoder


def case_of(source: CachedEmbedder, classes: int) -> Case:
    random = torch.Generator().manual_seed(0)
    words = [f"{one} {two}" for one in FIRST for two in SECOND]
    words += [f"{three} {word}" for three in FIRST for word in words]
    encoder = source.embedder.encoder
    size = encoder.image_size
    images = torch.randint(0, 256, (POOL, 3, size, size), generator=random, dtype=torch.uint8)
    labels = torch.randint(0, classes, (POOL,), generator=random)
    with torch.inference_mode():
        pooled = torch.cat([encoder.encode_image(part) for part in images.split(32)]).float()
    names = tuple(ClassName(word, (word,)) for word in words[:classes])
    return Case(source, names, images, labels, Part("train", Vectors("image", pooled.clone()), labels))


class Loop(ABC):
    """A training: `step` takes some rows and returns what is compared, a loss (1,) or logits (1,C)."""

    optimizer: torch.optim.Optimizer

    def step(self, rows: Tensor) -> Tensor:
        loss = self.loss(rows)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach().reshape(1)

    @abstractmethod
    def loss(self, rows: Tensor) -> Tensor:
        """() of some images."""


def sgd(values: Values, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(values.values()), lr, momentum=0.9, weight_decay=5e-4)


class Ours(Loop):
    """The add-on's own objective."""

    def __init__(self, case: Case, method: Method) -> None:
        self.case = case
        card = case.source.card
        addon = replace(method.addon, fitted=Fitted(card.fingerprint, card.logit_scale, "classification"))
        reference = Reference(class_names=case.names, few_shot=case.part, partial=True)
        self.task: Any
        if isinstance(addon, TextPrompts):
            self.task = addon.task(reference, case.source, addon.examples(reference))
        else:
            self.task = replace(addon.task(reference, case.source), pixels=Pixels(case.images))
        self.values: Values = {name: parameter(one) for name, one in addon.start(self.task).items()}
        self.of_rows: Callable[[Tensor], Tensor] = addon.objective(self.task, self.values)
        self.addon, self.optimizer = addon, sgd(self.values, method.lr)

    def step(self, rows: Tensor) -> Tensor:
        if isinstance(self.addon, TextPrompts):
            return super().step(rows)
        with self.addon.acting(self.case.encoder, self.values):
            return super().step(rows)

    def loss(self, rows: Tensor) -> Tensor:
        return self.of_rows(rows)


class Uncached(Ours):
    """CoOp as here, but for the images, which are encoded in each step."""

    def loss(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            images = self.case.encoder.encode_image(self.case.images[rows])
        scores = self.task.text.scores(images, self.task.text.features(self.values["vectors"]))
        return F.cross_entropy(self.task.scale * scores, self.case.labels[rows])


class Pixels(NamedTuple):  # in place of files
    images: Tensor

    def batch(self, rows: Tensor) -> Tensor:
        return self.images[rows]


class Plain(Loop):
    """The authors' loop: everything anew, at the full context length."""

    def __init__(self, case: Case, method: Method, start: Values, words: str) -> None:
        self.case, self.encoder = case, case.encoder
        self.values = {name: parameter(one) for name, one in start.items()}
        self.optimizer = sgd(self.values, method.lr)
        rows = self.encoder.tokenize([f"{words} {item.shown}." for item in case.names])
        self.tokens = F.pad(rows, (0, self.encoder.context_length - rows.shape[1]))
        self.scale = self.encoder.logit_scale().detach()
        tower = self.encoder.text_tower
        with torch.no_grad():
            self.bare = tower.token_vectors(self.tokens)
            self.positions = tower.embed(self.tokens[:1])[0] - self.bare[0]

    def texts(self, context: Tensor) -> Tensor:
        """(C,D) with vectors (M,W) behind the start token."""
        middle = context.expand(len(self.tokens), -1, -1)
        x = torch.cat([self.bare[:, :1], middle, self.bare[:, 1 + context.shape[0] :]], dim=1) + self.positions
        for block in self.encoder.text_tower.blocks:
            x = block(x)
        return F.normalize(self.encoder.text_tower.finish(x, self.tokens), dim=-1)

    def deep_texts(self, prompts: Tensor) -> Tensor:
        """(C,D) with vectors (J,n,W) in front of the first J blocks."""
        x, count = self.bare + self.positions, prompts.shape[1]
        for layer, block in enumerate(self.encoder.text_tower.blocks):
            if layer < len(prompts):
                x = torch.cat([x[:, :1], prompts[layer].expand(len(x), -1, -1), x[:, 1 + count :]], dim=1)
            x = block(x)
        return F.normalize(self.encoder.text_tower.finish(x, self.tokens), dim=-1)

    def deep_images(self, rows: Tensor, prompts: list[Tensor]) -> Tensor:
        """(b,D) with vectors (n,W) behind the patches in front of each of the first blocks."""
        tower = self.encoder.vision_tower
        x = tower.embed(self.case.images[rows])
        own = x.shape[1]
        for layer, block in enumerate(tower.blocks):
            if layer < len(prompts):
                x = torch.cat([x[:, :own], prompts[layer].expand(len(x), -1, -1)], dim=1)
            x = block(x)
        return F.normalize(tower.finish(x[:, :own]), dim=-1)

    def frozen_images(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return F.normalize(self.encoder.vision_tower.run(images), dim=-1)


class PlainCoOp(Plain):
    def loss(self, rows: Tensor) -> Tensor:
        images = self.frozen_images(self.case.images[rows])
        return F.cross_entropy(self.scale * images @ self.texts(self.values["vectors"]).T, self.case.labels[rows])


class PlainCoCoOp(Plain):
    def loss(self, rows: Tensor) -> Tensor:
        found, logits = self.values, []
        for image in self.frozen_images(self.case.images[rows]):
            inner = F.relu(F.linear(image, found["down"], found["down_bias"]))
            context = found["vectors"] + F.linear(inner, found["up"], found["up_bias"])
            logits.append(self.scale * self.texts(context) @ image)
        return F.cross_entropy(torch.stack(logits), self.case.labels[rows])


class PlainMaple(Plain):
    def loss(self, rows: Tensor) -> Tensor:
        text, found = self.values["text"], self.values
        prompts = [F.linear(text[j], found["maps"][j], found["offsets"][j]) for j in range(len(text))]
        images, texts = self.deep_images(rows, prompts), self.deep_texts(text)
        return F.cross_entropy(self.scale * images @ texts.T, self.case.labels[rows])


class PlainPromptSrc(Plain):
    known: Tensor
    share: float  # of the authors' weights, which stand beside 100 x cosine

    def loss(self, rows: Tensor) -> Tensor:
        texts = self.deep_texts(self.values["text"])
        images = self.deep_images(rows, list(self.values["image"]))
        before = self.frozen_images(self.case.images[rows])
        logits, kept = self.scale * images @ texts.T, self.scale * before @ self.known.T
        held = F.kl_div(logits.log_softmax(1), kept.log_softmax(1), reduction="sum", log_target=True) / logits.numel()
        held += self.share * (25 * F.l1_loss(texts, self.known) + 10 * F.l1_loss(images, before))
        total: Tensor = F.cross_entropy(logits, self.case.labels[rows]) + held
        return total


class PlainTpt(Plain):
    def step(self, rows: Tensor) -> Tensor:
        start = self.values  # each image starts anew
        self.values = {**start, "vectors": parameter(start["vectors"])}
        optimizer = torch.optim.AdamW([self.values["vectors"]], TUNING_LR)
        self.loss(rows).backward()
        optimizer.step()
        image = self.frozen_images(self.case.images[rows])
        with torch.no_grad():
            logits: Tensor = self.scale * image @ self.texts(self.values["vectors"]).T
        self.values = start
        return logits

    def loss(self, rows: Tensor) -> Tensor:
        """() entropy of the mean prediction over the surest tenth of the views of one image."""
        views = self.frozen_images(views_of(self.case.images[rows[0]]))
        chances = (self.scale * views @ self.texts(self.values["vectors"]).T).log_softmax(1)
        surest = (-(chances.exp() * chances).sum(1)).argsort()[: int(0.1 * len(views))]
        mean = chances[surest].logsumexp(0) - torch.tensor(float(len(surest))).log()
        entropy: Tensor = -(mean.exp() * mean).sum()
        return entropy


class OursTpt(Ours):
    def __init__(self, case: Case, method: Method) -> None:
        super().__init__(case, method)
        self.conditioned: ImageConditionedWeights = self.addon.weights(case.names, case.source)

    def step(self, rows: Tensor) -> Tensor:
        images = torch.cat([self.case.images[rows], views_of(self.case.images[rows[0]])])
        with torch.no_grad():
            both = self.case.encoder.encode_image(images)
        vectors = Vectors("image", both[:1], views=both[None, 1:])
        logits: Tensor = self.conditioned.scores(vectors) * self.task.scale
        return logits


def views_of(image: Tensor) -> Tensor:
    """(V,3,S,S) of (3,S,S): shifted by so many pixels; where views come from is not measured."""
    return torch.stack([image.roll(number, 2) for number in range(VIEWS)])


PLAIN: dict[str, type[Plain]] = {
    "coop": PlainCoOp, "cocoop": PlainCoCoOp, "maple": PlainMaple, "prompt_src": PlainPromptSrc, "tpt": PlainTpt,
}  # fmt: skip


def loops(name: str, case: Case) -> dict[str, Loop]:
    method = METHODS[name]
    ours = (OursTpt if name == "tpt" else Ours)(case, method)
    words = " ".join(["x"] * 16) if name == "coop" else "a photo of a"
    plain = PLAIN[name](case, method, ours.values, words)
    if isinstance(plain, PlainPromptSrc):
        plain.known, plain.share = ours.task.known, ours.task.from_paper(1.0)
    both: dict[str, Loop] = {"plain loop": plain, "vlkit": ours}
    if name == "coop":
        both["vlkit, images encoded in each step"] = Uncached(case, method)
    return both


def measure(name: str, case: Case, steps: int, warm_up: int) -> list[dict[str, Any]]:
    """A line for each loop."""
    random = torch.Generator().manual_seed(1)
    both = loops(name, case)
    ours = both["vlkit"]
    assert isinstance(ours, Ours)
    with frozen(case.encoder, but=list(ours.values.values())):
        times: dict[str, list[float]] = {kind: [] for kind in both}
        seen: dict[str, list[Tensor]] = {kind: [] for kind in both}
        for step in range(steps + warm_up):
            rows = torch.randint(0, POOL, (METHODS[name].batch,), generator=random)
            for kind, loop in both.items():
                began = time.perf_counter()
                seen[kind].append(loop.step(rows))
                times[kind] += [time.perf_counter() - began] if step >= warm_up else []
        works: dict[str, Callable[[], object]] = {kind: lambda one=loop: one.step(rows) for kind, loop in both.items()}  # type: ignore[misc]
        kept = {kind: saved_bytes(work) / MIB for kind, work in works.items()}
        peak = {kind: peak_rise(work) / MIB for kind, work in works.items()}
    plain = torch.stack(seen["plain loop"])
    return [
        {
            "method": name,
            "classes": len(case.names),
            "loop": kind,
            "ms": 1000 * statistics.median(times[kind]),
            "times_faster": statistics.median(times["plain loop"]) / statistics.median(times[kind]),
            "kept_mib": kept[kind],
            "peak_mib": peak[kind],
            "apart": (torch.stack(seen[kind]) - plain).abs().max().item(),
            "first": plain[0].max().item(),
            "last": plain[-1].max().item(),
        }
        for kind in both
    ]


def source_of(model: str) -> CachedEmbedder:
    if not model.startswith("random:"):
        return open_source(model, "cpu")
    from vlkit.models.embedder import Embedder
    from vlkit.models.open_clip_encoder import build_encoder

    torch.manual_seed(0)
    embedder = Embedder(build_encoder(model.partition(":")[2]).eval(), model)
    return CachedEmbedder(lambda: embedder, None, card_of(embedder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="local-dir:tests/data/encoder")
    parser.add_argument("--classes", default="100,1000")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2, help="steps before these, not counted")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    source = source_of(given.model)
    for classes in (int(one) for one in given.classes.split(",")):
        case = case_of(source, classes)
        for name in given.methods.split(","):
            for line in measure(name, case, given.steps, given.warm_up):
                print(json.dumps(line) if given.json else shown(line), flush=True)


def shown(line: Mapping[str, Any]) -> str:
    return (
        "{method:10} {classes:5} classes  {loop:35} {ms:9.1f} ms  {times_faster:5.2f}x  kept {kept_mib:7.1f} MiB  "
        "peak {peak_mib:7.1f} MiB  apart {apart:.1e}  ({first:.4f} to {last:.4f})".format(**line)
    )


if __name__ == "__main__":
    main()
