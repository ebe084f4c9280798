"""What [loss] and data.chunk_size make of a run: terms, the start of sigmoid training, the bias nobody reads."""

from typing import Any

import pytest
import torch

from vlkit.config import RunConfig, load_run
from vlkit.errors import ConfigError
from vlkit.losses import ClipLoss, SigmoidLoss
from vlkit.models.open_clip_encoder import build_encoder
from vlkit.training import assemble

CPU = torch.device("cpu")
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def settings(loss: Any = None, **architecture: Any) -> RunConfig:
    run: dict[str, Any] = {
        "run": {"out": "out", "steps": 1, "device": "cpu"},
        "model": {"architecture": {**ARCHITECTURE, **architecture}},
        "data": {"train": "shards", "global_batch_size": 8},
    }
    return load_run(run if loss is None else {**run, "loss": loss})


@pytest.mark.parametrize(
    ("loss", "weights"),
    [
        (None, {"clip": 1.0}),
        ({}, {"clip": 1.0}),
        ({"clip": 0.5}, {"clip": 0.5}),
        ({"sigmoid": 1}, {"sigmoid": 1.0}),
        ({"clip": 0.5, "sigmoid": {"weight": 2.0}}, {"clip": 0.5, "sigmoid": 2.0}),
    ],
)
def test_terms_and_weights(loss: Any, weights: dict[str, float]) -> None:
    run = settings(loss)
    assert {name: term.weight for name, term in run.loss.terms.items()} == weights
    # What is kept with the results reads back to the same run.
    assert RunConfig.model_validate_json(run.to_json()) == run


def test_parameters_of_a_term() -> None:
    run = settings({"clip": {"duplicates": "mask"}, "sigmoid": 1.0})
    terms = assemble.build_learner(run, CPU).module.objective.terms
    assert isinstance(terms["clip"], ClipLoss) and terms["clip"].duplicates == "mask"
    assert isinstance(terms["sigmoid"], SigmoidLoss) and terms["sigmoid"].duplicates == "keep"


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"clip": 0}, "loss.clip = 0: expected a weight above 0, or a table"),
        ({"sigmoid": "yes"}, 'loss.sigmoid = "yes": expected a weight above 0'),
        ({"sigmoyd": 1.0}, "loss.sigmoyd: unknown key. Did you mean sigmoid?"),
        ({"clip": {"duplicates": "drop"}}, "loss.clip.duplicates = \"drop\": expected 'keep' or 'mask'"),
    ],
)
def test_mistakes_are_named(loss: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        settings(loss)
    assert message in str(raised.value)


def test_sigmoid_training_starts_from_the_right_bias_and_scale() -> None:
    encoder = assemble.build_learner(settings({"sigmoid": 1.0}), CPU).encoder
    assert encoder.logit_bias is not None and encoder.logit_bias.requires_grad
    assert encoder.logit_bias.item() == -10
    assert encoder.logit_scale().item() == pytest.approx(10)
    assert encoder.training_family == "sigmoid"
    # The weights are those of the same seed without a bias.
    plain = assemble.build_learner(settings(), CPU).encoder.weights()
    same = encoder.weights()
    assert all(torch.equal(same[name], plain[name]) for name in plain if name != "logit_scale")


def test_weights_with_a_bias_keep_it() -> None:
    encoder = assemble.build_learner(settings({"sigmoid": 1.0}, init_logit_bias=-7.0), CPU).encoder
    assert encoder.logit_bias is not None and encoder.logit_bias.item() == -7


def test_plain_weights_get_a_bias_and_keep_everything_else() -> None:
    trained = build_encoder(ARCHITECTURE)
    biased = assemble.with_bias(trained)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(biased.eval().encode_image(images), trained.eval().encode_image(images))
    assert biased.record()["model_cfg"]["init_logit_bias"] == -10


def test_a_bias_that_no_loss_reads_is_not_trained() -> None:
    learner = assemble.build_learner(settings({"clip": 1.0}, init_logit_bias=-7.0), CPU)
    names = [name for group in learner.optimizer.param_groups for name in group["names"]]
    assert not any(name.endswith("logit_bias") for name in names)
    assert any(name.endswith("logit_scale") for name in names)


def test_images_at_a_time() -> None:
    run = settings()
    assert assemble.rows_at_a_time(run) == 8
    for size, rows in ((3, 3), (100, 8)):
        data = run.data.model_copy(update={"chunk_size": size})
        assert assemble.rows_at_a_time(run.model_copy(update={"data": data})) == rows


def test_a_precision_that_the_device_lacks_is_refused() -> None:
    run = settings()
    asked = run.model_copy(update={"optim": run.optim.model_copy(update={"precision": "bf16"})})
    assert assemble.choose_precision(asked, CPU) == "bf16" and assemble.choose_precision(run, CPU) == "fp32"
    # The device that computes nothing has no bf16 either.
    with pytest.raises(ConfigError, match=r'precision = "bf16", but the device meta has no bf16. Use "fp32" or "auto"'):
        assemble.choose_precision(asked, torch.device("meta"))
    assert assemble.choose_precision(run, torch.device("meta")) == "fp32"
