"""TextSpan finds the texts a head was made of, in the order of their variance; ablation leaves the rest alone."""

import pytest
import torch

from vlkit.errors import ConfigError
from vlkit.interpret.decomposition import Decomposition
from vlkit.interpret.text_span import text_span, without_heads


@pytest.fixture
def pool() -> torch.Tensor:
    texts = torch.randn(30, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.nn.functional.normalize(texts, dim=-1)


def made_of(pool: torch.Tensor, rows: list[int], sizes: list[float]) -> torch.Tensor:
    amounts = torch.randn(200, len(rows), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return amounts * torch.tensor(sizes) @ pool[rows] + 0.5


def test_the_texts_a_head_is_made_of(pool: torch.Tensor) -> None:
    orthogonal = torch.linalg.qr(pool[:12].T).Q.T  # so that one text is not half another
    span = text_span(made_of(orthogonal, [7, 3, 9], [3.0, 2.0, 1.0]), orthogonal, num_texts=3)
    assert span.texts == (7, 3, 9)
    assert span.explained[-1] == pytest.approx(1.0)
    assert list(span.explained) == sorted(span.explained)


def slow_text_span(data: torch.Tensor, pool: torch.Tensor, num_texts: int, rank: int) -> list[int]:
    """Algorithm 1 of the paper with explicit loops."""
    basis = torch.linalg.svd(data, full_matrices=False).Vh[:rank]
    texts = [sum((text @ b) * b for b in basis) for text in pool]
    rows = [row - data.mean(dim=0) for row in data]
    found = []
    for _ in range(num_texts):
        deviations = [torch.stack([row @ text for row in rows]).std() for text in texts]
        best = max(range(len(texts)), key=lambda i: deviations[i])
        found.append(best)
        axis = texts[best]
        rows = [row - (row @ axis) / (axis @ axis) * axis for row in rows]
        texts = [text - (text @ axis) / (axis @ axis) * axis for text in texts]
    return found


@pytest.mark.parametrize("rank", [80, 5])
def test_against_the_papers_loop(pool: torch.Tensor, rank: int) -> None:
    data = made_of(pool, [0, 1, 2, 3, 4, 5, 6], [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4])[:40]
    assert list(text_span(data, pool, num_texts=4, rank=rank).texts) == slow_text_span(data, pool, 4, rank)


def test_removing_what_is_explained_is_the_idea(pool: torch.Tensor) -> None:
    """A second copy of the best text explains nothing any more, however large its deviation was."""
    doubled = torch.cat([pool, pool[:1]])
    span = text_span(made_of(pool, [0, 1], [5.0, 0.5]), doubled, num_texts=2)
    assert not {0, 30} <= set(span.texts)


def test_too_little(pool: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="it needs at least 2 images"):
        text_span(pool[:1], pool)


def test_a_head_without_its_cue() -> None:
    heads = torch.randn(6, 2, 3, 8, generator=torch.Generator().manual_seed(2))
    parts = Decomposition(heads, torch.randn(6, 3, 8), torch.randn(6, 3, 8), torch.ones(6))
    torch.testing.assert_close(without_heads(parts, []), torch.nn.functional.normalize(parts.total(), dim=-1))
    changed = heads.clone()
    changed[:, 1, 2] = heads[:, 1, 2].mean(dim=0)
    expected = torch.nn.functional.normalize(parts._replace(heads=changed).total(), dim=-1)
    torch.testing.assert_close(without_heads(parts, [(-1, 2)], means=heads.mean(0)), expected)
    with pytest.raises(ConfigError, match="No head 3 in layer 0: this tower has 2 layers of 3"):
        without_heads(parts, [(0, 3)])
