"""The built wheel, installed in an empty environment outside the checkout, is whole: it runs, and its files are there.

The wheel is built by hatchling without isolation and installed by uv without its dependencies, so neither asks for a
network. The third-party packages come from the environment the tests run in: a .pth file appends its site-packages
to the path of the empty one. A path that was appended so is not read for .pth files itself, so the editable install
of the checkout does not come along, and the installed packages stand before anything else. That every third-party
package is declared is the matter of tests/test_architecture.py.
"""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from uv import find_uv_bin

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `vlkit` command in an environment of its own."""
    environment = tmp_path_factory.mktemp("empty") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    install = [find_uv_bin(), "pip", "install", "--quiet", "--offline", "--no-deps", "--no-config"]
    subprocess.run([*install, "--python", str(scripts / "python"), str(wheel)], check=True, env=clean_environment())
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (site / "third_party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts / "vlkit"


def clean_environment() -> dict[str, str]:
    """This one without what would lead an interpreter back to the checkout."""
    return {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}


def run(command: Path, *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [str(command), *arguments], cwd=cwd, env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_three_packages_and_all_their_files(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in inside} == {"vlkit", "data_tools", "eval"}
    in_checkout = {
        path.relative_to(ROOT).as_posix()
        for package in ("vlkit", "data_tools", "eval")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == in_checkout
    assert {"vlkit/py.typed", "data_tools/py.typed", "eval/py.typed"} <= inside
    assert {"vlkit/configs/demo.toml", "vlkit/configs/flickr8k_small.toml"} <= inside
    assert any(name.endswith(".html.j2") for name in inside)


def test_the_wheel_names_its_licence_and_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    texts = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
    assert "Apache License" in archive.read(texts["licenses/LICENSE"]).decode()
    assert "vlkit = vlkit.cli:main" in archive.read(texts["entry_points.txt"]).decode()
    assert "License-Expression: Apache-2.0" in archive.read(texts["METADATA"]).decode()


def test_info_runs_from_the_installed_packages(installed: Path, tmp_path: Path) -> None:
    facts = json.loads(run(installed, "info", "--json", cwd=tmp_path))
    environment = installed.parent.parent
    assert Path(facts["location"]).is_relative_to(environment)
    assert facts["eval"] == {"ours": True, "file": str(Path(facts["location"]).parent / "eval" / "__init__.py")}


def test_a_tiny_demo_runs_from_the_installed_packages(installed: Path, tmp_path: Path) -> None:
    run(installed, "demo", "--out", str(tmp_path / "demo"), "--scenes", "200", "--steps", "4", cwd=tmp_path)
    report = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert "</html>" in report
    assert "<img" in report
