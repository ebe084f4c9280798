"""Prompt templates by name, from a file, or written out: `a photo of a {}.`

load_templates("imagenet80")                # also "none", "photo", "simple"; templates.txt; "a drawing of a {}."
"""

from collections.abc import Sequence
from pathlib import Path

from vlkit.errors import ConfigError, did_you_mean
from vlkit.models.zero_shot_text import imagenet_templates, simple_templates

TEMPLATE_SETS = {
    "none": lambda: ("{}",),
    "photo": lambda: ("a photo of a {}.",),
    "simple": simple_templates,
    "imagenet80": imagenet_templates,
}
DEFAULT_TEMPLATES = "simple"


def load_templates(choice: str) -> tuple[str, ...]:
    """Templates named by a set, given in a file (one a line), or written out as one template with `{}`.

    Args:
        choice: a key of TEMPLATE_SETS, the path of a text file, or a template such as "a drawing of a {}".

    Raises:
        ConfigError: none of the three, or a template without exactly one `{}`.
    """
    if choice in TEMPLATE_SETS:
        return TEMPLATE_SETS[choice]()
    if "{}" in choice:
        return check_templates((choice,), "the option")
    path = Path(choice)
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        return check_templates(tuple(line.strip() for line in lines if line.strip()), str(path))
    raise ConfigError(
        f"Templates {choice!r} are neither a set ({', '.join(TEMPLATE_SETS)}), nor a file, nor a text with {{}}. "
        f"{did_you_mean(choice, TEMPLATE_SETS)} Give a file with one template a line, or a template in quotes."
    )


def check_templates(templates: Sequence[str], where: str) -> tuple[str, ...]:
    """The templates, once each holds exactly one `{}`.

    Raises:
        ConfigError: there is no template, or one has no `{}` or several.
    """
    if not templates:
        raise ConfigError(f"No template in {where}; write one a line, each with {{}} where the class name goes.")
    for template in templates:
        if template.count("{}") != 1:
            raise ConfigError(
                f"Template {template!r} in {where} has {template.count('{}')} placeholders; "
                f"each template needs exactly one {{}} where the class name goes."
            )
    return tuple(templates)
