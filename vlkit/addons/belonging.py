"""Whether fitted add-ons belong where they stand."""

from collections.abc import Sequence

from vlkit.addons.base import AddOn
from vlkit.addons.class_names import ClassName
from vlkit.errors import ConfigError

# Slots whose add-ons change the features that those after them see.
CHANGING = ("inputs", "towers", "feature_maps")


def check_before(addons: Sequence[AddOn]) -> None:
    """A fitted add-on belongs behind the very add-ons it was fitted behind.

    Raises:
        ConfigError: it stands behind others.
    """
    before: list[AddOn] = []
    for addon in addons:
        keys = tuple(one.key for one in before)
        if addon.fitted is not None and addon.fitted.before != keys:
            names = ", ".join(one.name for one in before) or "no add-on"
            raise ConfigError(
                f"{addon.name} was fitted on features that other add-ons had changed than stand before it now "
                f"({names}). It must be fitted again, in this pipeline: Pipeline([...]).fit(reference, source)."
            )
        if addon.slot in CHANGING:
            before.append(addon)


def require_same_classes(addon: AddOn, class_names: Sequence[ClassName]) -> None:
    """Refuse classes that an add-on was not fitted with.

    Raises:
        ConfigError: other classes, or another order.
    """
    assert addon.fitted is not None
    here = tuple(item.shown for item in class_names)
    if addon.fitted.class_names in ((), here):
        return
    there = addon.fitted.class_names
    missing = [name for name in here if name not in there]
    what = f"{missing[0]!r} is new" if missing else f"there were {len(there)}, in another order or number"
    raise ConfigError(
        f"{addon.name} was fitted for other classes ({what}) and holds for those alone. Fit it for these {len(here)}."
    )
