"""Muon against the singular value decomposition, against torch's own, and which parameters it takes."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from vlkit.config import OptimSettings
from vlkit.errors import ConfigError
from vlkit.training.muon import Muon, hidden_matrices, matrices_in, orthogonalized
from vlkit.training.optim import make_optimizer


class Block(nn.Module):
    """One of a tower's blocks, with attention as torch keeps it and as timm does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.qkv = nn.Linear(8, 24)
        self.conv = nn.Conv1d(8, 8, 1)
        self.inner = nn.Linear(8, 32)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.words = nn.Embedding(10, 8)
        self.positions = nn.Parameter(torch.randn(5, 8))
        self.blocks = nn.ModuleList([Block()])
        self.last = nn.Linear(8, 4)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)])
def test_the_step_keeps_the_directions_and_makes_them_equally_long(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    assert values[0] > 1.5 * values[-1]
    found = left.T @ orthogonalized(matrix) @ right.T
    assert (found - torch.diag(found.diagonal())).abs().max() < 1e-10
    assert found.diagonal().min() > 0.65 and found.diagonal().max() < 1.25


def test_steps_are_those_of_torch() -> None:
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((6, 10), (24, 8))]
    ours, theirs = ([nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    group = {"params": ours, "names": ["0.a.weight", "0.b.weight"], "weight_decay": 0.3, "muon": True}
    mine = Muon([group], lr=0.02, dtype=torch.bfloat16)
    torchs = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    made = torch.Generator().manual_seed(2)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=made)
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
    for start, a, b in zip(weights, ours, theirs, strict=True):
        moved = (b - start).norm()
        assert moved > 0.1
        assert (a - b).norm() < 0.01 * moved  # bf16, divided by the norm before rounding and after


def test_queries_keys_and_values_move_each_by_itself() -> None:
    stacked = nn.Parameter(torch.zeros(24, 8))
    alone = [nn.Parameter(torch.zeros(8, 8)) for _ in range(3)]
    stacked.grad = torch.randn(24, 8, generator=torch.Generator().manual_seed(3)) * torch.tensor([1e-3, 1, 1e3])[
        torch.arange(24) // 8
    ].unsqueeze(1)
    for part, gradient in zip(alone, stacked.grad.chunk(3), strict=True):
        part.grad = gradient.clone()
    for params, names in (([stacked], ["0.attn.in_proj_weight"]), (alone, ["0.q.weight", "0.k.weight", "0.v.weight"])):
        Muon([{"params": params, "names": names, "weight_decay": 0.0, "muon": True}], lr=0.1).step()
    assert torch.equal(stacked, torch.cat(list(alone)))
    lengths = [part.norm().item() for part in alone]
    assert max(lengths) < 1.3 * min(lengths)  # whatever the lengths of their gradients
    assert [matrices_in(name) for name in ("3.attn.qkv.weight", "3.attn.in_proj_weight", "3.fc1.weight")] == [3, 3, 1]


def test_hidden_matrices_and_nothing_else() -> None:
    assert hidden_matrices(Tower()) == {
        "blocks.0.attention.in_proj_weight", "blocks.0.attention.out_proj.weight", "blocks.0.qkv.weight",
        "blocks.0.inner.weight",
    }  # fmt: skip


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_each_kind_learns_at_its_rate_and_nothing_is_left_out(weight_decay: float) -> None:
    module = Tower()
    settings = OptimSettings(name="muon", lr=0.01, matrix_lr=0.05, weight_decay=weight_decay)
    optimizer = make_optimizer(module, settings, {"last.weight": 0.5})
    rates = {
        name: (group["muon"], group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["names"]
    }
    assert rates.keys() == {name for name, _ in module.named_parameters()}
    for name, (muon, rate, decay) in rates.items():
        assert muon is (name in hidden_matrices(module))
        assert rate == (5.0 if muon else 0.5 if name == "last.weight" else 1.0)
        assert not muon or decay == weight_decay


def test_what_muon_does_not_take_moves_as_by_adamw() -> None:
    torch.manual_seed(0)
    module, other = Tower(), Tower()
    other.load_state_dict(module.state_dict())
    optimizers = [make_optimizer(module, OptimSettings(name="muon")), make_optimizer(other, OptimSettings())]
    for _ in range(3):
        for a, b in zip(module.parameters(), other.parameters(), strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    theirs = dict(other.named_parameters())
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, theirs[name]) is (name not in hidden_matrices(module)), name


def test_a_parameter_without_a_gradient_stays() -> None:
    module = Tower()
    before: dict[str, Tensor] = {name: value.clone() for name, value in module.named_parameters()}
    make_optimizer(module, OptimSettings(name="muon")).step()
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())


def test_a_rate_of_matrices_without_muon_is_refused() -> None:
    with pytest.raises(ValidationError, match='matrix_lr is of name = "muon"'):
        OptimSettings(matrix_lr=0.1)


def test_a_run_without_such_matrices_is_refused() -> None:
    module = Tower()
    module.blocks.requires_grad_(False)
    with pytest.raises(ConfigError, match='Use "adamw"'):
        make_optimizer(module, OptimSettings(name="muon"))


def test_open_clip_towers_give_their_blocks() -> None:
    import open_clip

    model = open_clip.CLIP(
        embed_dim=8,
        vision_cfg={"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2},
        text_cfg={"context_length": 8, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1},
    )
    found = hidden_matrices(model)
    assert len(found) == 4 * 3
    assert {name.partition(".resblocks.")[0] for name in found} == {"visual.transformer", "transformer"}
