from typing import Any

import pytest
import torch

from vlkit.addons.merges.arithmetic import Arithmetic
from vlkit.addons.reference import Reference
from vlkit.errors import ConfigError

TEXT = torch.tensor([[0.2, -0.4, 0.6]])
IMAGE = torch.tensor([[0.8, -0.6, 0.0]])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("sum", [0.5, -0.5, 0.3]),
        # (1 + 0.2) / 2 * (1 + 0.8) / 2 and so on: two negative scores stay below a positive and a zero.
        ("product", [0.54, 0.06, 0.4]),
        ("minimum", [0.2, -0.6, 0.0]),
        ("text", [0.2, -0.4, 0.6]),
        ("image", [0.8, -0.6, 0.0]),
    ],
)
def test_rules_by_hand(rule: Any, expected: list[float], tiny_source: Any) -> None:
    fitted = Arithmetic(rule).fit(Reference(task="retrieval"), tiny_source())
    assert fitted.merge([TEXT, IMAGE])[0].tolist() == pytest.approx(expected)


def test_the_share_is_that_of_the_words() -> None:
    assert torch.equal(Arithmetic(share=1.0).merge([TEXT, IMAGE]), TEXT)
    assert torch.equal(Arithmetic(share=0.0).merge([TEXT, IMAGE]), IMAGE)


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="the query has 1 part"):
        Arithmetic().merge([TEXT])
    with pytest.raises(ConfigError, match="rule is 'max'"):
        Arithmetic("max").merge([TEXT, IMAGE])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="only with the rule `sum`"):
        Arithmetic("product", share=0.3).merge([TEXT, IMAGE])
