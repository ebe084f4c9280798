"""A source of features without a model: what add-ons are tested on.

Fixtures:
    tiny_source     `ToySource`: texts and images have the vectors of the words in them; few dimensions, exact.
    tower_case      a tiny CLIP with pictures of three colours; learned_well checks what learns inside its towers.
    blobs           `blobs(shots=4, val=True)`: features in clouds as a reference, for methods that use nothing else.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlkit.addons.base import Fitted
from vlkit.addons.class_names import parse_class
from vlkit.addons.exchange import ClassWeights, Vectors
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Part, Reference, Stream
from vlkit.addons.saved import load_addon, save_addon
from vlkit.contracts import Progress
from vlkit.data.records import ImageRef, Record
from vlkit.errors import ConfigError
from vlkit.features.model_card import ModelCard
from vlkit.features.source import FeatureSource
from vlkit.models.embedder import EmbeddedChunk, Embedder

DIM = 16


class ToySource(FeatureSource):
    """The vector of a text is the sum of its words' vectors; of an image, of the words in its key, and noise.

    An image with `broken` in its key cannot be read.
    """

    def __init__(self, dim: int = DIM, logit_scale: float = 20.0, name: str = "toy", sigmoid: bool = False) -> None:
        self._card = ModelCard(
            name=name,
            identity=f"identity of {name}",
            weights=hashlib.sha256(name.encode()).hexdigest(),
            architecture="toy",
            preprocess="{}",
            tokenizer="words",
            embed_dim=dim,
            logit_scale=logit_scale,
            logit_bias=-5.0 if sigmoid else None,
            family="sigmoid" if sigmoid else "softmax",
            decode="fast",
            precision="fp32",
        )
        self.images_read = 0

    @property
    def card(self) -> ModelCard:
        return self._card

    @property
    def embedder(self) -> Embedder:
        raise AssertionError("a toy has no model inside")

    def iterate_embeddings(
        self,
        images: Sequence[Any],
        batch_size: int = 64,
        progress: Progress | None = None,
        workers: int | None = None,
    ) -> Iterator[EmbeddedChunk]:
        rows = [row for row, image in enumerate(images) if "broken" not in image.key]
        failures = [(row, "broken") for row in range(len(images)) if row not in rows]
        self.images_read += len(images)
        raw = torch.stack([self.image(images[row].key) for row in rows]) if rows else torch.empty(0, self.embed_dim)
        yield EmbeddedChunk(rows, F.normalize(raw, dim=-1), failures, raw.norm(dim=-1))

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256, progress: Progress | None = None) -> Tensor:
        return F.normalize(torch.stack([self.words(text) for text in texts]), dim=-1)

    def image(self, key: str) -> Tensor:
        noise = torch.randn(self.embed_dim, generator=_seeded(f"noise {key}"))
        return 3 * self.words(key.rpartition("#")[0] or key) + 1.5 * noise

    def words(self, text: str) -> Tensor:
        words = text.lower().replace(".", " ").split() or [""]
        return torch.stack([torch.randn(self.embed_dim, generator=_seeded(word)) for word in words]).sum(0)


def _seeded(text: str) -> torch.Generator:
    return torch.Generator().manual_seed(int(hashlib.sha256(text.encode()).hexdigest()[:12], 16))


@pytest.fixture
def tiny_source() -> type[ToySource]:
    return ToySource


@pytest.fixture
def toy_records() -> Any:
    """`toy_records(["cat", "dog"], 5)`: images of each class, labelled, with their name as caption."""

    def make(names: Sequence[str], count: int, first: int = 0) -> list[Record]:
        return [
            Record(f"{name}#{number}", ImageRef(data=b"x"), captions=(f"{name}",), label=label)
            for number in range(first, first + count)
            for label, name in enumerate(names)
        ]

    return make


@pytest.fixture
def blobs() -> Callable[..., Reference]:
    """Clouds of unit vectors, one a class; class vectors stand beside the clouds, so that labelled images help."""

    def make(
        classes: int = 3,
        shots: int = 4,
        *,
        val: bool = False,
        stream: int = 0,
        noise: float = 0.2,
        beside: float = 0.2,
        logit_scale: float = 20.0,
        seed: int = 0,
    ) -> Reference:
        random = torch.Generator().manual_seed(seed)

        def unit(centres: torch.Tensor, spread: float) -> torch.Tensor:
            return F.normalize(centres + spread * torch.randn(centres.shape, generator=random), dim=-1)

        centres = unit(torch.zeros(classes, DIM), 1.0)
        weights = ClassWeights(unit(centres, beside), torch.arange(classes))

        def part(split: str, count: int) -> Part:
            labels = torch.arange(classes).repeat_interleave(count)
            images = unit(centres[labels], noise)
            views = unit(images[:, None].expand(-1, 3, -1), noise / 4)
            return Part(split, Vectors("image", images, views=views), labels)

        shown = part("train", shots)
        return Reference(
            class_names=tuple(parse_class(f"class {number}") for number in range(classes)),
            few_shot=shown,
            val=part("val", 4) if val else None,
            stream=Stream(part("stream", stream).vectors) if stream else None,
            weights=weights,
            logits=lambda images: logit_scale * weights.scores(images.pooled),
        )

    return make


@pytest.fixture(scope="session")
def tower_case() -> Any:
    """A tiny CLIP, and twelve noisy pictures of three colours to learn from; `images` and `tokens` to look at."""
    from vlkit.features.model_card import card_of
    from vlkit.features.source import CachedEmbedder
    from vlkit.models.open_clip_encoder import build_encoder

    torch.manual_seed(0)
    encoder = build_encoder(TOWERS).eval()
    for name, weight in encoder.named_parameters():
        if name.endswith("in_proj_weight"):  # fresh attention is nearly uniform
            weight.data *= 4
    model = Embedder(encoder, "tiny towers")
    source = CachedEmbedder(lambda: model, None, card_of(model))
    records = tuple(_picture(label, number) for label in range(3) for number in range(4))
    labels = torch.tensor([record.label for record in records])
    shots = Part("train", Vectors("image", source.embed_images(records)), labels, records)
    return SimpleNamespace(
        encoder=encoder,
        source=source,
        reference=Reference(
            class_names=tuple(parse_class(name) for name in ("red", "green | lime", "blue")),
            few_shot=shots,
            passes=Passes(source),
        ),
        images=torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)),
        tokens=encoder.tokenize(["a photo of a dog.", "a photo of a black cat."]),
    )


@pytest.fixture
def learned_well(tower_case: Any, tmp_path: Path) -> Callable[[Any], Any]:
    """`learned_well(addon)`: the fitted add-on, after what holds for all that learn inside towers has been checked."""

    def loss(logits: Tensor) -> float:
        return F.cross_entropy(logits, tower_case.reference.few_shot.labels).item()

    def logits(pipeline: Pipeline) -> Tensor:
        reference = tower_case.reference
        vectors = reference.passes.read(reference.few_shot.records, pipeline.edits).vectors
        classifier = pipeline.classifier(reference.class_names, tower_case.source, "photo")
        return classifier.logits(vectors)

    def check(addon: Any) -> Any:
        case = tower_case
        before = {name: value.clone() for name, value in case.encoder.state_dict().items()}
        stock = case.encoder.encode_image(case.images), case.encoder.encode_text(case.tokens)
        drawn = torch.random.get_rng_state()
        pipeline = Pipeline([addon]).fit(case.reference, case.source, "photo")
        fitted: Any = pipeline.addons[0]
        assert torch.equal(torch.random.get_rng_state(), drawn), "draws from a generator of its own"
        again = Pipeline([addon]).fit(case.reference, case.source, "photo").addons[0]
        assert again.key == fitted.key, "equal seeds give equal bits"
        assert Pipeline([addon]).fit(replace(case.reference, seed=1), case.source).addons[0].key != fitted.key
        assert loss(logits(pipeline)) < loss(logits(Pipeline())) - 0.02, "it learns"
        loaded = load_addon(save_addon(fitted, tmp_path / "addon"))
        assert torch.equal(logits(Pipeline([loaded])), logits(pipeline))
        after = case.encoder.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in after)
        assert all(weight.requires_grad for weight in case.encoder.parameters())
        now = case.encoder.encode_image(case.images), case.encoder.encode_text(case.tokens)
        assert torch.equal(now[0], stock[0]) and torch.equal(now[1], stock[1])
        modules = list(case.encoder.modules())
        assert not any(one._forward_hooks or one._forward_pre_hooks or "forward" in vars(one) for one in modules)
        with pytest.raises(ConfigError, match="Fit it alone"):
            replace(addon).fit(replace(case.reference, before=("other",)), case.source)
        return fitted

    return check


@pytest.fixture
def task_of(tower_case: Any) -> Callable[[Any], Any]:
    """`task_of(addon)`: the training that `fit` would start."""

    def make(addon: Any) -> Any:
        seen = Pipeline()._seen_by(addon, tower_case.reference, tower_case.source, "photo")
        card = tower_case.source.card
        fitted = Fitted(card.fingerprint, card.logit_scale, "classification")
        return replace(addon, fitted=fitted).task(seen, tower_case.source)

    return make


TOWERS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2},
}


def _picture(label: int, number: int) -> Record:
    random = torch.Generator().manual_seed(100 * label + number)
    pixels = torch.randint(0, 160, (36, 44, 3), generator=random, dtype=torch.uint8)
    pixels[..., label] += 90
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return Record(f"{label}#{number}", ImageRef(data=file.getvalue()), label=label)
