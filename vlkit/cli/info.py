"""`vlkit info`: what a bug report needs to say about this machine and this installation."""

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vlkit
from vlkit.cli.console import Json, print_json, print_table
from vlkit.cli.own_eval import hiding_file, own_eval_file
from vlkit.features.cache_folder import cache_folder

# Those whose version decides results or speed; read from their metadata, because importing them takes seconds.
PACKAGES = (
    "torch",
    "torchvision",
    "open-clip-torch",
    "timm",
    "transformers",
    "webdataset",
    "faiss-cpu",
    "numpy",
    "pillow",
    "simplejpeg",
    "pyarrow",
    "safetensors",
    "huggingface-hub",
)


def info(json: Json = False) -> None:
    """Show versions, devices, folders and settings."""
    facts = collect()
    if json:
        print_json(facts)
    else:
        print_table(None, ("what", "value"), _rows(facts))


def collect() -> dict[str, Any]:
    """Everything `vlkit info` shows, ready for JSON.

    Returns:
        `vlkit`, `location`, `python`, `platform`, `packages` (name to version, None where missing), `cores`,
        `devices`, `folders` (cache, weights), `environment` (VLKIT_DATA and others as set, or None) and `eval`
        (`ours`, `file`).
    """
    from vlkit.engine import default_workers

    hiding = hiding_file()
    return {
        "vlkit": vlkit.__version__,
        "location": str(Path(vlkit.__file__).resolve().parent),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cores": default_workers(),  # a container often grants fewer than the machine has
        "devices": devices(),
        "folders": {"cache": str(cache_folder()), "weights": _weights_folder()},
        "environment": {name: os.environ.get(name) for name in ("VLKIT_DATA", "VLKIT_CACHE", "HF_HUB_OFFLINE")},
        "eval": {"ours": hiding is None, "file": str(hiding or own_eval_file())},
    }


def devices() -> list[dict[str, Any]]:
    """The devices `--device auto` chooses from, best first: name, description, memory in GiB where it is known."""
    import torch

    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = round(properties.total_memory / 2**30, 1)
        found.append({"name": f"cuda:{index}", "description": properties.name, "memory_gib": memory})
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "description": "Apple GPU", "memory_gib": None})
    threads = torch.get_num_threads()
    found.append({"name": "cpu", "description": f"{platform.machine()}, {threads} threads", "memory_gib": None})
    return found


def _weights_folder() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, facts[name]) for name in ("vlkit", "location", "python", "platform")]
    rows += [(name, found or "not installed") for name, found in facts["packages"].items()]
    rows.append(("cores", str(facts["cores"])))
    for device in facts["devices"]:
        memory = "" if device["memory_gib"] is None else f", {device['memory_gib']} GiB"
        rows.append((device["name"], device["description"] + memory))
    rows += [(f"{name} folder", path) for name, path in facts["folders"].items()]
    rows += [(name, value or "not set") for name, value in facts["environment"].items()]
    owner = "vlkit's own" if facts["eval"]["ours"] else "HIDES vlkit's own: commands that evaluate will refuse"
    rows.append(("package eval", f"{owner} ({facts['eval']['file']})"))
    return rows
