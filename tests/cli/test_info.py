"""`vlkit info`: everything a bug report needs, as a table and as JSON."""

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import vlkit
from vlkit.cli.info import PACKAGES, devices
from vlkit.features.cache_folder import cache_folder


def test_json_is_one_object_that_agrees_with_the_modules(call_vlkit: Callable[..., Any]) -> None:
    called = call_vlkit("info", "--json")
    assert called.code == 0
    (line,) = called.out.splitlines()
    facts = json.loads(line)
    assert facts["vlkit"] == vlkit.__version__
    assert facts["python"].startswith(platform.python_version())
    assert facts["packages"]["numpy"] == numpy.__version__
    assert facts["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert set(facts["packages"]) == set(PACKAGES)
    assert facts["eval"]["ours"] is True
    assert facts["devices"][-1]["name"] == "cpu"
    assert 1 <= facts["cores"] <= (os.cpu_count() or 1)


def test_table_shows_the_folders(call_vlkit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLKIT_DATA", "somewhere")
    called = call_vlkit("info")
    assert called.code == 0
    assert "somewhere" in called.out
    assert "cache folder" in called.out
    assert called.err == ""


def test_a_package_that_is_missing_is_said(call_vlkit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlkit.cli.info.PACKAGES", ("numpy", "no-such-distribution"))
    assert json.loads(call_vlkit("info", "--json").out)["packages"]["no-such-distribution"] is None
    assert "not installed" in call_vlkit("info").out


def test_the_cache_lies_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLKIT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


@pytest.mark.parametrize(
    ("system", "variable", "below"),
    [
        ("linux", "XDG_CACHE_HOME", "vlkit"),
        ("win32", "LOCALAPPDATA", "vlkit"),
        ("darwin", "HOME", "Library/Caches/vlkit"),
    ],
)
def test_else_in_the_users_cache_folder(
    system: str, variable: str, below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLKIT_CACHE")
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setenv(variable, str(tmp_path))
    assert cache_folder() == tmp_path / below


@pytest.mark.gpu
def test_a_gpu_comes_first_with_its_memory() -> None:
    first = devices()[0]
    assert first["name"] == "cuda:0"
    assert first["memory_gib"] > 0.5
