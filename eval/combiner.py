"""A query out of a reference image and a condition in words: a small head on frozen features, trained on triplets.

combiner = train_combiner(images, conditions, mine_triplets(read_facts(records), 20_000))
query = combiner.combine(image, text)                # (Q,D), unit norm
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eval.caption_triplets import Triplets
from vlkit.contracts import Progress
from vlkit.errors import CheckpointError, ConfigError, DataError

_WEIGHTS, _RECORD = "combiner.safetensors", "combiner.json"
_DROPOUT = 0.5
_LEAST_RATE = 1e-3  # of the learning rate, at the end


@dataclass(frozen=True)
class CombinerSettings:
    """How a combiner is made and trained.

    Attributes:
        projection, hidden: widths as multiples of D; the paper's 2560 and 5120 are 4 and 8 times its 640.
        logit_scale: of the cosines in the loss, fixed.
        lr: of AdamW without weight decay, falling as a cosine, epoch by epoch, to a thousandth.
        batch_size: triplets a step; the others' targets are the negatives.
        epochs: passes over the triplets; the one with the best recall on held-out triplets is kept.
        held_out: share of the triplets that only choose.
        distractors: their images are negatives too.
        seed: of weights, dropout and order.
    """

    projection: int = 4
    hidden: int = 8
    logit_scale: float = 100.0
    lr: float = 1e-4
    batch_size: int = 256
    epochs: int = 6
    held_out: float = 0.1
    distractors: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: a number that is not positive, or a batch without negatives.
        """
        numbers = (self.projection, self.hidden, self.epochs, self.batch_size - 1, self.lr, self.logit_scale)
        if min(numbers) <= 0 or not 0 < self.held_out < 1:
            raise ConfigError(
                f"{self}: every number must be positive, a batch hold two, and held_out lie within 0 and 1."
            )


class Combiner(nn.Module):
    """unit( W dropout(relu(V c)) + s t + (1 - s) f ), where c joins the projections of condition t and image f.

    s is the sigmoid of a two-layer head on c. With W = 0 it is a mean whose weights depend on both.

    Args:
        dim: D.
        settings: widths.

    Source: Baldrati et al. 2022, "Effective Conditioned and Composed Image Retrieval" (CLIP4Cir); as in the released
    code of Vaze et al. 2023, arXiv:2306.07969, models/combiner_model.py.
    Differs: f and t have unit norm, since stored text features have no length; the released code joins raw features.
    """

    def __init__(self, dim: int, settings: CombinerSettings) -> None:
        super().__init__()
        projection, hidden = settings.projection * dim, settings.hidden * dim
        self.text = nn.Sequential(nn.Linear(dim, projection), nn.ReLU(), nn.Dropout(_DROPOUT))
        self.image = nn.Sequential(nn.Linear(dim, projection), nn.ReLU(), nn.Dropout(_DROPOUT))
        self.joined = nn.Sequential(nn.Linear(2 * projection, hidden), nn.ReLU(), nn.Dropout(_DROPOUT))
        self.output = nn.Linear(hidden, dim)
        self.gate = nn.Sequential(
            nn.Linear(2 * projection, hidden), nn.ReLU(), nn.Dropout(_DROPOUT), nn.Linear(hidden, 1), nn.Sigmoid()
        )

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Queries (B,D), unit norm, of images and conditions (B,D)."""
        both = torch.cat([self.text(text), self.image(image)], dim=-1)
        share = self.gate(both)
        return F.normalize(self.output(self.joined(both)) + share * text + (1 - share) * image, dim=-1)

    @torch.no_grad()
    def combine(self, image: Tensor, text: Tensor) -> Tensor:
        """The same after training, without dropout; any number of rows."""
        self.eval()
        parts = zip(image.split(4096), text.split(4096), strict=True)
        return torch.cat([self(one, other) for one, other in parts])


def combiner_loss(query: Tensor, gallery: Tensor, left_out: Tensor, logit_scale: float) -> Tensor:
    """() cross-entropy of each query's own target among the targets of the batch.

    Args:
        query: (B,D) unit norm.
        gallery: (B+E,D) unit norm: the targets in the order of the queries, then E more negatives.
        left_out: (B,B+E) bool: another triplet's image that is the query's own target, so no negative.
        logit_scale: of the cosines.

    Source: Vaze et al. 2023, arXiv:2306.07969, section 4; released code, train/epoch_train_functions.py: from query to
    target only, in the batch.
    Differs: `left_out`; the paper's 1.6 million triplets hardly ever meet, those of a few thousand images do. The
    released code embeds the text distractors but leaves them out of its loss: here they are an option.
    """
    logits = (logit_scale * query @ gallery.T).masked_fill(left_out, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(query)))


def train_combiner(
    images: Tensor,
    conditions: Tensor,
    triplets: Triplets,
    settings: CombinerSettings | None = None,
    progress: Progress | None = None,
) -> Combiner:
    """Train on frozen features.

    Args:
        images: (N,D) unit norm, rows of the triplets.
        conditions: (K,D) unit norm, of `triplets.conditions`.
        triplets: some of them are held out to choose the epoch.
        settings: see there.
        progress: called with (done, total) steps.

    Raises:
        DataError: too few triplets for a batch of two beside the held-out ones.

    Source: Vaze et al. 2023, arXiv:2306.07969, section 4 and its released code.
    Differs: the towers stay frozen (the paper trains them with the head, at a learning rate of 1e-6, which would leave
    a fresh head where it is); the epoch is chosen on held-out triplets, not on CIRR; gradients are not clipped.
    """
    chosen = settings or CombinerSettings()
    order = torch.randperm(len(triplets), generator=torch.Generator().manual_seed(chosen.seed))
    num_held = max(1, round(chosen.held_out * len(triplets)))
    held, own = triplets.at(order[:num_held]), triplets.at(order[num_held:])
    if len(own) < 2:
        raise DataError(f"{len(triplets)} triplets; expected at least 3 to train a combiner.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)  # of weights and dropout
        combiner = Combiner(images.shape[1], chosen)
        return _trained(combiner, images, conditions, own, held, chosen, progress)


def _trained(
    combiner: Combiner,
    images: Tensor,
    conditions: Tensor,
    own: Triplets,
    held: Triplets,
    settings: CombinerSettings,
    progress: Progress | None,
) -> Combiner:
    optimizer = torch.optim.AdamW(combiner.parameters(), settings.lr, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs, settings.lr * _LEAST_RATE)
    generator = torch.Generator().manual_seed(settings.seed)
    size = min(settings.batch_size, len(own))
    steps = len(own) // size
    best, kept = -1.0, combiner.state_dict()
    for epoch in range(settings.epochs):
        combiner.train()
        order = torch.randperm(len(own), generator=generator)
        for step in range(steps):
            batch = own.at(order[step * size : (step + 1) * size])
            query = combiner(images[batch.reference], conditions[batch.condition])
            gallery = torch.cat([batch.target, batch.distractor]) if settings.distractors else batch.target
            left_out = batch.target[:, None] == gallery[None]
            left_out.fill_diagonal_(False)
            loss = combiner_loss(query, images[gallery], left_out, settings.logit_scale)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if progress:
                progress(epoch * steps + step + 1, settings.epochs * steps)
        falling.step()
        reached = held_out_recall(combiner, images, conditions, held)
        if reached > best:
            best, kept = reached, {name: value.clone() for name, value in combiner.state_dict().items()}
    combiner.load_state_dict(kept)
    return combiner.eval()


def held_out_recall(combiner: Combiner, images: Tensor, conditions: Tensor, triplets: Triplets) -> float:
    """Share of triplets whose target comes first among the distinct targets; a tie is a miss."""
    query = combiner.combine(images[triplets.reference], conditions[triplets.condition])
    gallery, own = triplets.target.unique(return_inverse=True)
    scores = query @ images[gallery].T
    right = scores.gather(1, own[:, None])
    others = scores.scatter(1, own[:, None], -torch.inf)
    return float((right[:, 0] > others.amax(1)).double().mean()) if len(gallery) > 1 else 1.0


def save_combiner(folder: str | Path, combiner: Combiner, settings: CombinerSettings, identity: str) -> None:
    """Write weights and settings; `identity` is that of the model whose features it was trained on.

    Raises:
        DataError: it cannot be written.
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in combiner.state_dict().items()}, place / _WEIGHTS)
        dim = combiner.output.out_features
        record = {"dim": dim, "model_identity": identity, "settings": asdict(settings)}
        (place / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")  # last: it is complete
    except OSError as error:
        raise DataError(f"Cannot write the combiner to {place}: {error.strerror or error}.") from error


def load_combiner(folder: str | Path, identity: str) -> Combiner:
    """What `save_combiner` wrote, for the same model.

    Raises:
        CheckpointError: nothing there, damaged, or of another model.
    """
    place = Path(folder)
    try:
        record = json.loads((place / _RECORD).read_text(encoding="utf-8"))
        combiner = Combiner(int(record["dim"]), CombinerSettings(**record["settings"]))
        combiner.load_state_dict(load_file(place / _WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ConfigError, SafetensorError) as error:
        raise CheckpointError(
            f"{place} holds no combiner that can be read ({error}). Train one with --captions."
        ) from error
    if record["model_identity"] != identity:
        raise CheckpointError(
            f"The combiner in {place} was trained on features of another model ({record['model_identity'][:12]}, not "
            f"{identity[:12]}). Train one for this model: --captions DATA and another folder."
        )
    return combiner.eval()
