"""CPP: clusters of frozen features by the principle of rate reduction, how many there are, and their members.

settings = CppSettings(hidden=512, dim=64, epochs=60)
head = train_head(features, settings)                          # a small network on (N,D) features
codes = head.run(features)
clusters = spectral_clusters(membership(codes.codes, settings.eta), num_clusters=10)
count = best_number(codes.features, memberships, (5, 10, 20))  # the shortest total coding length

Source: Chu et al. 2024, "Image Clustering via the Principle of Rate Reduction in the Age of Pretrained Models", ICLR,
arXiv:2306.05272; released code CPP. Losses, memberships and coding lengths follow the paper; eps is 0.1.
Differs: Spectral clustering takes the mean of Pi and its transpose, which is symmetric. The released script for the
features alone ignores the cluster head; here both heads are trained and each is used for what it is made for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkit.contracts import Progress
from vlkit.errors import ConfigError, DataError

EPS = 0.1
_HALF_STEPS = 5
# Weight of the squared memberships, which keeps them from concentrating.
_SPREAD = 0.025


@dataclass(frozen=True)
class CppSettings:
    """How the head is trained; defaults are those of the paper for CIFAR-10 and ViT-L/14.

    Attributes:
        hidden, dim: width of the trunk, and of features and codes.
        eta: temperature of the memberships.
        epochs: passes over the features.
        warm_up: first steps, which only spread the features.
        batch_size: images a step; memory grows with it times dim squared.
        lr: of both optimisers (SGD, momentum 0.9).
        seed: of weights and order.
    """

    hidden: int = 4096
    dim: int = 128
    eta: float = 0.175
    epochs: int = 15
    warm_up: int = 50
    batch_size: int = 1024
    lr: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: a number that is not positive.
        """
        small = min(self.hidden, self.dim, self.epochs, self.batch_size - 1)
        if small < 1 or self.warm_up < 0 or min(self.eta, self.lr) <= 0:
            raise ConfigError(f"{self}: every number must be positive, and a batch hold two images.")


class Codes(NamedTuple):
    """What the two heads give, unit norm."""

    features: Tensor  # (N,dim)
    codes: Tensor  # (N,dim)


class RateReductionHead(nn.Module):
    """Trunk of two layers with a head for features and one for codes."""

    def __init__(self, width: int, settings: CppSettings) -> None:
        super().__init__()
        hidden = settings.hidden
        self.trunk = nn.Sequential(
            nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.features = nn.Linear(hidden, settings.dim)
        self.codes = nn.Linear(hidden, settings.dim)

    def forward(self, images: Tensor) -> Codes:
        """(B,D) -> features and codes (B,dim)."""
        inner = self.trunk(images)
        return Codes(F.normalize(self.features(inner), dim=-1), F.normalize(self.codes(inner), dim=-1))

    @torch.no_grad()
    def run(self, images: Tensor) -> Codes:
        """All images (N,D), after training."""
        self.eval()
        parts = [self(images[start : start + 4096]) for start in range(0, len(images), 4096)]
        return Codes(torch.cat([part.features for part in parts]), torch.cat([part.codes for part in parts]))


def train_head(images: Tensor, settings: CppSettings, progress: Progress | None = None) -> RateReductionHead:
    """Train on features (N,D), unsupervised.

    Args:
        images: as the model gives them; the released code does not bring them to unit norm, vlkit's are.
        settings: see there.
        progress: called with (done, total) steps.

    Raises:
        DataError: fewer than two images.
    """
    if len(images) < 2:
        raise DataError(f"{len(images)} images; there is nothing to cluster.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = RateReductionHead(images.shape[1], settings)
    shared = [*head.trunk.parameters(), *head.features.parameters()]
    optimizers = [
        torch.optim.SGD(shared, settings.lr, momentum=0.9, weight_decay=1e-4),
        torch.optim.SGD(head.codes.parameters(), settings.lr, momentum=0.9, weight_decay=5e-3),
    ]
    generator = torch.Generator().manual_seed(settings.seed)
    size = min(settings.batch_size, len(images))
    steps = settings.epochs * (len(images) // size)
    order, place = torch.randperm(len(images), generator=generator), 0
    head.train()
    for step in range(steps):
        if place + size > len(order):
            order, place = torch.randperm(len(images), generator=generator), 0
        out = head(images[order[place : place + size]])
        place += size
        loss = -rate(out.features) if step < settings.warm_up else cpp_loss(out, settings.eta)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if step + 1 == settings.warm_up:
            head.codes.load_state_dict(head.features.state_dict())
        if progress:
            progress(step + 1, steps)
    return head


def cpp_loss(out: Codes, eta: float) -> Tensor:
    """() negative rate reduction of features under the memberships of codes, and a little of the latter's size."""
    member = membership(out.codes, eta)
    return rate_of_groups(out.features, member) - rate(out.features) + _SPREAD * member.square().sum()


def rate(features: Tensor) -> Tensor:
    """() R = 1/2 logdet(I + d/(m eps) Z Z^T) of features (m,d)."""
    size, dim = features.shape
    return 0.5 * _log_det(features.T @ features * (dim / (size * EPS)))


def rate_of_groups(features: Tensor, member: Tensor) -> Tensor:
    """() Rc of features (m,d) in soft groups, the columns of `member` (m,g)."""
    size, dim = features.shape
    total = member.sum(0) + 1e-8
    # All outer products once: (m,d*d) is the largest thing here.
    outer = (features[:, :, None] * features[:, None, :]).flatten(1)
    grams = (member.T @ outer).unflatten(1, (dim, dim))
    return (total / (2 * size) * _log_det(grams * (dim / (total * EPS))[:, None, None])).sum()


def membership(codes: Tensor, eta: float) -> Tensor:
    """Pi (m,m) of unit-norm codes (m,d): doubly stochastic after infinitely many steps, rows exactly after five."""
    logs = (codes @ codes.T).abs() / eta
    for half in range(_HALF_STEPS):
        logs = logs - logs.logsumexp(dim=1 - half % 2, keepdim=True)
    return logs.exp()


def coding_length(features: Tensor, clusters: Tensor) -> float:
    """Nats that features (N,d) take once their clusters (N,) are told; the right number of them makes it short."""
    total, dim = features.shape
    length = 0.0
    for cluster in clusters.unique().tolist():
        own = features[clusters == cluster].double()
        size = len(own)
        volume = _log_det(own.T @ own * (dim / (EPS * size)))
        length += (size + dim) / 2 * volume.item() - size * math.log(size / total)
    return length


def spectral_clusters(member: Tensor, num_clusters: int, seed: int = 0) -> Tensor:
    """(N,) int64 clusters of memberships (N,N): eigenvectors of the normalised Laplacian, unit rows, k-means.

    Raises:
        ConfigError: more clusters than images, or fewer than one.
    """
    if not 1 <= num_clusters <= len(member):
        raise ConfigError(f"{num_clusters} clusters of {len(member)} images; expected 1 to that.")
    weights = (member + member.T).double() / 2
    scale = weights.sum(1).clamp(min=1e-12).rsqrt()
    vectors = torch.linalg.eigh(scale[:, None] * weights * scale).eigenvectors[:, -num_clusters:]
    return k_means(F.normalize(vectors, dim=1), num_clusters, seed)


def k_means(rows: Tensor, num_clusters: int, seed: int = 0) -> Tensor:
    """(N,) int64 clusters of rows (N,d), the best of ten starts."""
    from sklearn.cluster import KMeans

    found = KMeans(num_clusters, n_init=10, random_state=seed).fit_predict(rows.double().numpy())
    return torch.from_numpy(found).long()


def best_number(features: Tensor, member: Tensor, candidates: Sequence[int], seed: int = 0) -> dict[int, float]:
    """Total coding length of features (N,d) for each number of clusters; the smallest is the answer.

    Raises:
        ConfigError: no candidate, or more clusters than images.
    """
    if not candidates:
        raise ConfigError("There is no number of clusters to try.")
    return {count: coding_length(features, spectral_clusters(member, count, seed)) for count in candidates}


def _log_det(gram: Tensor) -> Tensor:
    """logdet(I + gram), of one or several."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # Twice the sum of the logarithms of Cholesky's diagonal: stable, and its gradient is defined.
    lower: Tensor = torch.linalg.cholesky(eye + gram)
    return 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
