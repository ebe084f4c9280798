"""The learning rate worked by hand; the rates of layers and of the temperature in the optimiser's groups."""

import math
from typing import Any

import pytest
import torch

from vlkit.config import OptimSettings, load_run
from vlkit.errors import ConfigError
from vlkit.settings import Duration
from vlkit.training import assemble
from vlkit.training.schedules import learning_rate, make_schedule

CPU = torch.device("cpu")


def test_cosine_by_hand() -> None:
    rates = [learning_rate(step, steps=8, warmup=4, peak=1.0, end=0.2) for step in range(8)]
    # Four steps up; then 0.2 + 0.4 (1 + cos(pi t)) for t = 0, 1/4, 1/2, 3/4.
    half = math.sqrt(0.5)
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.6 + 0.4 * half, 0.6, 0.6 - 0.4 * half])
    assert learning_rate(8, steps=8, warmup=4, peak=1.0, end=0.2) == pytest.approx(0.2)


def test_warmup_stable_decay_by_hand() -> None:
    rates = [learning_rate(step, steps=10, warmup=2, peak=1.0, end=0.1, kind="wsd", decay=4) for step in range(11)]
    # Two steps up, four at the top, then 0.1 + 0.9 (1 - sqrt(t)) for t = 0, 1/4, 1/2, 3/4, and the end.
    falling = [0.1 + 0.9 * (1 - math.sqrt(t)) for t in (0, 0.25, 0.5, 0.75, 1)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, *falling])


def test_the_top_of_wsd_does_not_depend_on_the_length_of_the_run() -> None:
    short, long = (
        [learning_rate(step, steps=steps, warmup=3, peak=2.0, kind="wsd", decay=5) for step in range(15)]
        for steps in (20, 100)
    )
    assert short == long


def test_at_the_edges() -> None:
    assert learning_rate(0, steps=1, warmup=0, peak=2.0) == 2.0
    assert learning_rate(5, steps=5, warmup=5, peak=2.0) == 2.0  # a run that is all warmup
    assert learning_rate(5, steps=5, warmup=5, peak=2.0, kind="wsd", decay=3) == 2.0
    assert [learning_rate(step, steps=4, warmup=2, peak=3.0, kind="constant") for step in range(4)] == [1.5, 3, 3, 3]
    assert learning_rate(100, steps=10, warmup=0, peak=1.0, end=0.1) == pytest.approx(0.1)  # never rises again


@pytest.mark.parametrize("part", [Duration(10, "steps"), Duration(0.1, "fraction"), Duration(0.5, "epochs"),
                                  Duration(80, "samples")])  # fmt: skip
def test_warmup_and_decay_in_every_unit(part: Duration) -> None:
    settings = OptimSettings(lr=1.0, warmup=part, schedule="wsd", decay=part)
    schedule = make_schedule(settings, steps=100, steps_per_epoch=20, batch_size=8)
    assert schedule(0) == pytest.approx(0.1)
    assert schedule(9) == schedule(90) == 1.0
    assert schedule(91) < 1.0 and schedule(100) == 0.0


def run_file(model: dict[str, Any], **optim: Any) -> Any:
    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    return load_run(
        {
            "run": {"out": "out", "steps": 1, "device": "cpu"},
            "model": {"architecture": architecture, **model},
            "data": {"train": "shards", "global_batch_size": 8},
            "optim": optim,
        }
    )


def test_layer_wise_rates_and_the_temperatures_own_reach_the_optimizer() -> None:
    learner = assemble.build_learner(run_file({}, lr=1e-2, layer_decay=0.5, logit_scale_lr=2e-3), CPU)
    groups = learner.optimizer.param_groups
    found = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert found["encoder.model.visual.proj"] == 1
    assert found["encoder.model.visual.transformer.resblocks.0.attn.in_proj_weight"] == 0.25
    assert found["encoder.model.text.token_embedding.weight"] == 0.25
    assert found["encoder.model.logit_scale"] == pytest.approx(0.2)
    assert set(found) == {name for name, value in learner.module.named_parameters() if value.requires_grad}


def test_freezing_but_for_the_last_layers_and_lora() -> None:
    learner = assemble.build_learner(run_file({"freeze": ["image"], "unfreeze": {"image": 1}}), CPU)
    trained = [name for name, value in learner.encoder.named_parameters() if value.requires_grad]
    assert [name for name in trained if ".visual." in name] == ["model.visual.proj"]
    learner = assemble.build_learner(run_file({"freeze": ["image"], "lora": {"rank": 2}}), CPU)
    trained = [name for name, value in learner.encoder.named_parameters() if value.requires_grad]
    assert trained and all("logit_scale" in name or (".text." in name and ".0." in name) for name in trained)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"unfreeze": {"image": 1}}, "unfreeze names image, which freeze does not"),
        ({"freeze": ["image", "text"]}, "freeze names both towers"),
        ({"lora": {"targets": []}}, "targets is empty"),
        ({"patch_dropout": 1.0}, "model.patch_dropout = 1.0"),
    ],
)
def test_mistakes_in_the_run_file(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        run_file(model)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"freeze": ["image"], "lora": {"towers": ["image"]}}, "names every tower of model.lora"),
        ({"freeze": ["image"], "unfreeze": {"image": 1}, "lora": {}}, "model.unfreeze cannot be kept"),
    ],
)
def test_what_does_not_go_together(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assemble.build_learner(run_file(model), CPU)


def test_recomputed_activations_give_the_same_gradients() -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = []
    for again in (False, True):
        encoder = assemble.build_learner(run_file({"grad_checkpointing": again}), CPU).encoder
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):  # type: ignore[func-returns-value] # noqa: B023
            kept: list[int] = []
            out = encoder.encode_image(images)
        out.sum().backward()
        found.append((sum(kept), encoder.model.visual.conv1.weight.grad.clone()))
    torch.testing.assert_close(found[0][1], found[1][1])
    assert found[1][0] < 0.7 * found[0][0]
