"""DPL, decoupled prompt learning: in layers with prompts, attention between prompts and words or patches taken apart.

With instance tokens X (words, patches) and prompts P, attention is four sub-processes: X <- X, X <- P, P <- X, P <- P.

    scaled:     softmax over all keys, each of the four with a factor of its own beside the exponentials
    separate:   out_X = (1 - g) attend(X <- X) + g attend(X <- P),   g = tanh(learned), 0 at the start

In the second, prompts cannot drown what the tower attends to by itself: at first it is the frozen tower.

Source: Xu et al. 2023, "DPL: Decoupled Prompt Learning for Vision-Language Models", arXiv:2308.10061.
Differs: EXPERIMENTAL. There is no code, and no source that was reached says which sub-processes the paper strengthens,
nor how. The two modes above are a choice made here. The paper's text prompts conditioned on language are left out, for
nothing is known of how they are made. Prompts, their start and the training are those of `ivlp`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vlkit.addons.base import learned
from vlkit.addons.tower_learning import Learned, TowerTask
from vlkit.addons.towers.ivlp import IndependentPrompts
from vlkit.errors import ConfigError
from vlkit.models.attention import attention_logits, attention_parts, feed_forward, mix_values
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.tower import Block

# Where the prompts of a layer stand, out of the number of its tokens.
Places = Callable[[int], slice]
# Logits (B,H,L,L) and which tokens are prompts (L,) -> the map (B,H,L,L).
Weighting = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Dpl(IndependentPrompts):
    """Prompts in both towers with attention taken apart.

    Attributes:
        mode: "separate" or "scaled".
        to_self, to_prompt, from_instance, among_prompts: factors of X <- X, X <- P, P <- X, P <- P where `scaled`;
            all 1 is ordinary attention, as in `ivlp`.
    """

    mode: Literal["separate", "scaled"] = "separate"
    to_self: float = 1.0
    to_prompt: float = 1.0
    from_instance: float = 1.0
    among_prompts: float = 1.0
    text_gates: Tensor | None = learned()  # (J,) before tanh
    image_gates: Tensor | None = learned()  # (J,)

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: a factor that is not above 0, or one that `separate` makes no use of.
        """
        factors = self.to_self, self.to_prompt, self.from_instance, self.among_prompts
        if min(factors) <= 0:
            raise ConfigError(f"dpl: factors are {factors}; each must be above 0.")
        if self.mode == "separate" and factors != (1.0, 1.0, 1.0, 1.0):
            raise ConfigError("dpl: mode=separate has a learned gate and no factors; leave them out, or mode=scaled.")

    def start(self, task: TowerTask) -> Learned:
        """As IVLP, gates closed."""
        prompts = super().start(task)
        if self.mode == "scaled":
            return prompts
        return {**prompts, **{f"{side}_gates": torch.zeros(len(of_side)) for side, of_side in prompts.items()}}

    @contextmanager
    def acting(self, encoder: DualEncoder, found: Learned) -> Iterator[None]:
        """Prompts in both towers, attention apart in the layers that have them."""
        text, image = found["text"], found["image"]
        count = image.shape[1]
        with super().acting(encoder, found), ExitStack() as stack:
            for layer, block in enumerate(encoder.text_tower.blocks[: len(text)]):
                way = self._weighting(found.get("text_gates"), layer)
                stack.enter_context(apart(block, lambda length: slice(1, 1 + text.shape[1]), way))
            for layer, block in enumerate(encoder.vision_tower.blocks[: len(image)]):
                way = self._weighting(found.get("image_gates"), layer)
                stack.enter_context(apart(block, lambda length: slice(length - count, length), way))
            yield

    def _weighting(self, gates: Tensor | None, layer: int) -> Weighting:
        if gates is None:
            factors = torch.tensor([[self.to_self, self.to_prompt], [self.from_instance, self.among_prompts]])
            return lambda logits, prompts: scaled(logits, prompts, factors)
        return lambda logits, prompts: separate(logits, prompts, gates[layer].to(logits).tanh())


def scaled(logits: Tensor, prompts: Tensor, factors: Tensor) -> Tensor:
    """Softmax with a factor for each of the four sub-processes.

    Args:
        logits: (B,H,L,L), masked.
        prompts: (L,) bool.
        factors: (2,2) rows: instance, prompt; columns: attended instance, prompt.
    """
    kind = prompts.long()
    return (logits + factors.to(logits).log()[kind[:, None], kind]).softmax(-1)


def separate(logits: Tensor, prompts: Tensor, gate: Tensor) -> Tensor:
    """Instance tokens attend to each other and, apart from that, to the prompts; prompts to all.

    Args:
        logits: (B,H,L,L), masked.
        prompts: (L,) bool.
        gate: () how much of the second counts; 0: none. Tokens that see no prompt have none.
    """
    minus = logits.new_tensor(-math.inf)
    among = torch.where(prompts, minus, logits).softmax(-1)
    to_prompts = torch.where(prompts, logits, minus)
    sees = to_prompts.amax(-1, keepdim=True) > minus
    # A row of nothing but -inf would be 0/0, in backward too.
    onto = torch.where(sees, to_prompts, 0.0).softmax(-1) * sees
    share = gate * sees
    instance = (1 - share) * among + share * onto
    return torch.where(prompts[:, None], logits.softmax(-1), instance)


@contextmanager
def apart(block: Block, places: Places, weighting: Weighting) -> Iterator[None]:
    """Within it a block mixes its tokens by another map; nothing else of it changes."""
    module: Any = block.module

    def forward(x: Tensor, attn_mask: Tensor | None = None, **other: Any) -> Tensor:
        prompts = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
        prompts[places(x.shape[1])] = True
        parts = attention_parts(module, x)
        weights = weighting(attention_logits(parts.query, parts.key, attn_mask), prompts)
        x = x + mix_values(module, weights, parts.value)
        return x + feed_forward(module, x)

    # On the object, over the method of its class, which comes back when the attribute goes.
    assert "forward" not in vars(module), f"{type(module).__name__} runs something else already"
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


ADDON = Dpl
