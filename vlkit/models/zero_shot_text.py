"""open_clip's prompt templates and ImageNet class names, read without importing open_clip.

open_clip keeps them in one module of plain lists; importing the package around it takes seconds.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def imagenet_templates() -> tuple[str, ...]:
    """The 80 ImageNet templates of the CLIP paper, as strings with `{}`."""
    return _as_strings(_metadata().OPENAI_IMAGENET_TEMPLATES)


def simple_templates() -> tuple[str, ...]:
    """The 7 templates that OpenAI's prompt notebook found to do nearly as well as the 80."""
    return _as_strings(_metadata().SIMPLE_IMAGENET_TEMPLATES)


def imagenet_class_names() -> tuple[str, ...]:
    """The 1,000 curated ImageNet class names in the order of the sorted WordNet ids."""
    return tuple(_metadata().IMAGENET_CLASSNAMES)


@cache
def _metadata() -> ModuleType:
    package = find_spec("open_clip")
    assert package is not None and package.submodule_search_locations, "open_clip_torch is a dependency"
    path = Path(package.submodule_search_locations[0]) / "zero_shot_metadata.py"
    spec = spec_from_file_location("vlkit_open_clip_zero_shot_metadata", path)
    assert spec is not None and spec.loader is not None, path
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _as_strings(templates: Sequence[Callable[[str], str]]) -> tuple[str, ...]:
    return tuple(template("{}") for template in templates)
