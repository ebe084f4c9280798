"""TPT: one step on each image alone, as slow code does it; nothing is left of it afterwards."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.class_weights.tpt import Tpt, agreement
from vlkit.addons.exchange import Vectors
from vlkit.addons.prompt_fit import parameter
from vlkit.errors import ConfigError

NAMES = ["dog", "black cat", "boat"]


def images(given: Any, count: int = 5, views: int = 20) -> Vectors:
    pooled = given.few_shot.vectors.pooled[:count]
    random = torch.Generator().manual_seed(7)
    around = F.normalize(pooled[:, None] + 0.2 * torch.randn(count, views, 32, generator=random), dim=-1)
    return Vectors("image", pooled, views=torch.cat([pooled[:, None], around], dim=1))


def test_without_a_step_it_is_the_hand_template(small: Any, labelled: Any) -> None:
    given = labelled(NAMES)
    hand = small().embed_texts([f"a photo of a {name}." for name in NAMES])
    shown = images(given)
    for settings in ({"lr": 0.0}, {"tuning_steps": 0}):
        fitted = Tpt(**settings).fit(given, small())  # type: ignore[arg-type]
        scores = fitted.weights(given.class_names, small()).scores(shown)
        assert torch.allclose(scores, shown.pooled @ hand.T, atol=1e-6)


def test_one_image_by_hand(small: Any, labelled: Any) -> None:
    given, source = labelled(NAMES), small()
    fitted = Tpt(share=0.25).fit(given, source)
    shown, text = images(given), fitted.prompted(given.class_names, source)
    found = fitted.weights(given.class_names, source).scores(shown)
    for row in (0, 4):
        context = parameter(text.words[0])
        optimizer = torch.optim.AdamW([context], 5e-3)
        views = shown.views[row]  # type: ignore[index]
        chances = (source.logit_scale * views @ text.features(context).T).softmax(-1)
        entropies = [-sum(float(p.detach()) * float(p.detach().log()) for p in one) for one in chances]
        kept = sorted(range(len(views)), key=lambda view: entropies[view])[: int(0.25 * 21)]
        mean = chances[kept].mean(0)
        (context.grad,) = torch.autograd.grad(-(mean * mean.log()).sum(), context)  # the encoder is shared by tests
        optimizer.step()
        with torch.no_grad():
            expected = text.features(context) @ shown.pooled[row]
        assert torch.allclose(found[row], expected, atol=1e-5), row


def test_images_do_not_know_of_each_other_and_nothing_stays(small: Any, labelled: Any) -> None:
    given = labelled(NAMES)
    fitted, shown = Tpt(lr=0.05).fit(given, small()), images(given)
    weights = fitted.weights(given.class_names, small())
    together, again = weights.scores(shown), weights.scores(shown)
    alone = torch.cat([weights.scores(shown.rows([row])) for row in range(5)])
    assert torch.equal(together, again) and torch.allclose(together, alone, atol=1e-5)
    plain = Tpt(lr=0.0).fit(given, small()).weights(given.class_names, small()).scores(shown)
    scale = small().logit_scale
    before, after = (agreement(scale * torch.stack([one] * 3, 1), 1.0).mean() for one in (plain, together))
    assert after < before - 1e-3  # the image itself is one of its surest views


def test_bad_settings_and_images_without_views(small: Any, labelled: Any) -> None:
    given = labelled(NAMES)
    with pytest.raises(ConfigError, match="share"):
        Tpt(share=0.0).fit(given, small())
    fitted = Tpt().fit(given, small())
    with pytest.raises(ConfigError, match="views"):
        fitted.weights(given.class_names, small()).scores(replace(images(given), views=None))
