"""What [model] and [optim] make of an encoder before it is trained: which weights learn, how fast, at what cost."""

from torch import nn

from vlkit.config import RunConfig
from vlkit.errors import ConfigError, ModelError
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.layers import Side, freeze, layer_rates, tower_modules
from vlkit.models.lora import add_lora
from vlkit.models.patch_dropout import PatchDropout, add_patch_dropout


def prepare(encoder: DualEncoder, run: RunConfig) -> PatchDropout | None:
    """Freeze, add LoRA and patch dropout, recompute activations, as the run says; the dropout, if there is one.

    Raises:
        ConfigError: the run wants what does not go together.
        ModelError: this encoder cannot do it.
    """
    for tower in run.model.freeze:
        freeze(encoder, tower, run.model.unfreeze.get(tower, 0))
    if run.model.lora is not None:
        if run.model.unfreeze:
            raise ConfigError("model.lora freezes all but its own updates, so model.unfreeze cannot be kept. Drop one.")
        lora = run.model.lora
        towers = [tower for tower in lora.towers if tower not in run.model.freeze]
        if not towers:
            raise ConfigError("model.freeze names every tower of model.lora, so nothing would be trained. Drop one.")
        add_lora(encoder, rank=lora.rank, alpha=lora.alpha, towers=towers, targets=lora.targets)
    _freeze_scalars(encoder, run)
    if run.model.grad_checkpointing:
        _recompute(encoder)
    return add_patch_dropout(encoder, run.model.patch_dropout) if run.model.patch_dropout else None


def compile_blocks(encoder: DualEncoder) -> None:
    """torch.compile on each block where a tower can be entered, else on the tower as a whole; weights keep names.

    Blocks have all the same shape, so that compiling takes the time of one; the losses stay as they are.
    """
    sides: tuple[Side, ...] = ("image", "text")
    for side in sides:
        try:
            tower = encoder.vision_tower if side == "image" else encoder.text_tower
            modules = [block.module for block in tower.blocks]
        except ModelError:
            modules = list(tower_modules(encoder, side).values())
        for module in modules:
            module.compile()


def lr_scales(module: nn.Module, encoder: DualEncoder, run: RunConfig) -> dict[str, float]:
    """Name of a parameter of `module`, which holds the encoder -> its share of the learning rate, where it is not 1.

    Raises:
        ModelError: `layer_decay` with a tower whose layers have no known order.
    """
    optim = run.optim
    rates = layer_rates(encoder, optim.layer_decay) if optim.layer_decay < 1 else {}
    if optim.logit_scale_lr is not None:
        scale = optim.logit_scale_lr / optim.lr
        rates |= {name: scale for name, _ in encoder.named_parameters() if name.rpartition(".")[2] == "logit_scale"}
    of_encoder = {id(parameter): name for name, parameter in encoder.named_parameters()}
    named = [(name, of_encoder.get(id(parameter))) for name, parameter in module.named_parameters()]
    return {name: rates[own] for name, own in named if own in rates}


def _freeze_scalars(encoder: DualEncoder, run: RunConfig) -> None:
    """What no loss reads: wrappers for several processes ask for every gradient."""
    terms = run.loss.terms
    unread = set() if "sigmoid" in terms else {"logit_bias"}
    if run.loss.fast_clip is not None and run.loss.fast_clip.version == 1 and set(terms) == {"fast_clip"}:
        unread.add("logit_scale")
    if run.model.frozen:
        # A head is trained beside an encoder that stays what it is, temperature included.
        unread.add("logit_scale")
    for name, parameter in encoder.named_parameters():
        if name.rpartition(".")[2] in unread:
            parameter.requires_grad_(False)


def _recompute(encoder: DualEncoder) -> None:
    enable = getattr(encoder, "set_grad_checkpointing", None)
    if enable is None:
        raise ConfigError(f"model.grad_checkpointing: {type(encoder).__name__} keeps all activations. Leave it out.")
    enable()
