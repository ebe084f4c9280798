"""The shipped numbers of parameters against models built without memory.

`python tests/models/test_parameter_counts.py` writes vlkit/models/parameter_counts.json anew for another release of
open_clip.
"""

import json
from pathlib import Path

import pytest
import torch

import vlkit.models
from vlkit.models import catalogue
from vlkit.models.architecture import resolve_architecture
from vlkit.models.dual_encoder import parameters_per_tower


def count(name: str) -> list[int | None]:
    import open_clip

    config = resolve_architecture(name).constructor_arguments()
    needs_hub = "hf_model_name" in config["text_cfg"]
    if needs_hub:
        config["text_cfg"] = {"width": 64, "heads": 1, "layers": 1}
    with torch.device("meta"):
        model = (open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP)(**config)
    counts = parameters_per_tower(model)
    return [counts["image"].total, None if needs_hub else counts["text"].total]


def shipped() -> dict[str, list[int | None]]:
    path = Path(vlkit.models.__path__[0]) / "parameter_counts.json"
    counts: dict[str, list[int | None]] = json.loads(path.read_text())
    return counts


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16-SigLIP", "ViT-S-32"])
def test_some(name: str) -> None:
    assert shipped()[name] == count(name)


@pytest.mark.slow
def test_all() -> None:
    assert shipped() == {name: count(name) for name in catalogue.architectures()}


if __name__ == "__main__":
    lines = (f"  {json.dumps(name)}: {json.dumps(count(name))}" for name in catalogue.architectures())
    (Path(vlkit.models.__path__[0]) / "parameter_counts.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
