"""The README's commands and Python are run as written, and its table of methods is the one in the code.

How the README is written:
    - Every ```sh and ```python block is headed by a comment on the line above it, either
          <!-- runs: STORY -->                          or
          <!-- runs: STORY; short: OPTIONS -->          or
          <!-- not run: the reason -->
    - The blocks of one STORY (any name: demo, flickr8k, ...) run one after the other in one empty folder, and its
      Python blocks share their variables, so that a later block uses what an earlier one made. `$VLKIT_DATA` is set.
    - An sh block of a story holds one `vlkit` command a line (`\\` continues a line; globs and `$VARIABLES` work; no
      pipes, no redirection). `make demo` counts as the `vlkit demo` that it runs.
    - A block that takes long says in `short:` which options make it short. They are put behind every `vlkit train`
      and `vlkit demo` of the block.
    - Between `<!-- methods -->` and `<!-- /methods -->` stands the table made from the METHODS of the folders, between
      `<!-- measured -->` and `<!-- /measured -->` that of tests/benchmarks/addons_measured.json (what it holds and who
      writes it: addons_measured.py beside it); `make readme` writes both.

The default run calls the commands in this process, with the short options, on miniatures of the data sets that are
laid out like the real ones. `make slow` runs every story in bash, to the letter, on the real data in $VLKIT_DATA.
"""

import glob
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from vlkit.addons.registry import addon_rows
from vlkit.contracts import MethodRow

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

_TABLE = re.compile(r"(?<=<!-- methods -->\n).*?(?=\n<!-- /methods -->)", re.DOTALL)
_MEASURED = re.compile(r"(?<=<!-- measured -->\n).*?(?=\n<!-- /measured -->)", re.DOTALL)
_FENCED = re.compile(r"^(?P<above>.*)\n```(?P<language>sh|python)\n(?P<code>(?:.*\n)*?)```$", re.MULTILINE)
_RUNS = re.compile(r"<!-- runs: (?P<story>[\w-]+)(?:; short: (?P<short>.+?))? -->")


class Block(NamedTuple):
    """One fenced block that is run."""

    story: str
    language: str
    code: str
    short: tuple[str, ...]


def blocks(text: str) -> Iterator[Block]:
    for found in _FENCED.finditer(text):
        runs = _RUNS.fullmatch(found["above"])
        if runs:
            yield Block(runs["story"], found["language"], found["code"], tuple(shlex.split(runs["short"] or "")))


def unheaded(text: str) -> list[str]:
    """First lines of the blocks that neither run nor say why not."""
    return [
        found["code"].partition("\n")[0]
        for found in _FENCED.finditer(text)
        if not _RUNS.fullmatch(found["above"]) and not re.fullmatch(r"<!-- not run: .+ -->", found["above"])
    ]


def stories(text: str) -> dict[str, list[Block]]:
    told: dict[str, list[Block]] = {}
    for block in blocks(text):
        told.setdefault(block.story, []).append(block)
    return told


def commands(block: Block) -> Iterator[list[str]]:
    """The arguments of each `vlkit` command of an sh block, as a shell would give them."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words == ["make", "demo"]:
            words = ["vlkit", "demo"]
        if not words:
            continue
        assert words[0] == "vlkit", f"only vlkit commands are run: {line}"
        assert not {"|", ">", ">>", "&&", ";", "&"} & set(words), f"one plain command a line: {line}"
        arguments = [match for word in words[1:] for match in _expand(word)]
        yield arguments + (list(block.short) if arguments[0] in {"train", "demo"} else [])


def _expand(word: str) -> list[str]:
    word = os.path.expandvars(word)
    assert "$" not in word, f"not set: {word}"
    return sorted(glob.glob(word)) or [word]


def methods_table() -> str:
    """The rows of every folder of methods, folder by folder."""
    holders = [path.parent for path in (ROOT / "vlkit").rglob("__init__.py") if "METHODS: dict" in path.read_text()]
    names = [".".join(folder.relative_to(ROOT).parts) for folder in holders]
    modules = sorted(names, key=lambda name: (name.startswith("vlkit.addons"), name))  # what trains comes first
    rows: list[MethodRow] = [row for name in modules for row in importlib.import_module(name).METHODS.values()]
    lines = ["| method | slot | needs | cost | when to use it | source |", "|---|---|---|---|---|---|"]
    lines += [f"| `{r.name}` | {r.slot} | {r.needs} | {r.cost} | {r.when} | {r.source} |" for r in rows]
    return "\n".join(lines)


def measured_table() -> str:
    """What each add-on changes on real data: a line for each method, data set, number of shots and metric."""
    lines = [
        "| method | data | shots | metric | plain → with it | change (95% interval) | remarks |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in json.loads((ROOT / "tests" / "benchmarks" / "addons_measured.json").read_text(encoding="utf-8")):
        digits = 2 if row["metric"] == "mIoU" else 1
        points = " to ".join(f"{100 * row[key]:+.{digits}f}" for key in ("low", "high"))
        values = f"{row['plain']:.{digits}%} → {row['value']:.{digits}%}"
        remarks = "; ".join(part for part in (row["settings"], row["note"]) if part)
        cells = (f"`{row['method']}`", row["data"], row["shots"], row["metric"], values)
        lines.append(f"| {' | '.join(cells)} | {100 * row['change']:+.{digits}f} ({points}) | {remarks} |")
    return "\n".join(lines)


STORIES = stories(README)


@pytest.fixture(scope="session")
def miniatures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What $VLKIT_DATA holds, laid out the same, with a few generated pictures in each set."""
    folder = tmp_path_factory.mktemp("miniatures")
    flickr8k(folder / "flickr8k")
    coco(folder / "coco_small")
    class_folders(folder / "caltech101", ("Faces", "Faces_easy", "Leopards", "sea_horse"))
    class_folders(folder / "cifar10_test", ("airplane", "automobile", "cat"))
    return folder


@pytest.mark.parametrize("story", STORIES)
def test_the_story_runs_on_miniatures(
    story: str, miniatures: Path, call_vlkit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLKIT_DATA", str(miniatures))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    for block in STORIES[story]:
        if block.language == "python":
            exec(compile(block.code, f"README.md, {story}", "exec"), names)
            continue
        for arguments in commands(block):
            called = call_vlkit(*arguments)
            assert called.code == 0, f"vlkit {shlex.join(arguments)}\n{called.err}"


@pytest.mark.slow
@pytest.mark.parametrize("story", STORIES)
def test_the_story_runs_to_the_letter(story: str, vlkit_data: Path, tmp_path: Path) -> None:
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "VLKIT_DATA": str(vlkit_data), "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    for block in STORIES[story]:
        code = block.code.replace("make demo", "vlkit demo")
        program = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
        done = subprocess.run([*program, code], cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, code


def test_make_demo_is_vlkit_demo() -> None:
    recipe = re.search(r"^demo: env\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    assert recipe[1] == "$(BIN)/vlkit demo"


def test_the_table_of_methods() -> None:
    shown = _TABLE.search(README)
    assert shown is not None
    assert shown[0] == methods_table(), "run `make readme`"


def test_the_table_of_measurements() -> None:
    shown = _MEASURED.search(README)
    assert shown is not None
    assert shown[0] == measured_table(), "run `make readme`"


def test_every_addon_has_a_measured_line() -> None:
    folder = ROOT / "tests" / "benchmarks"
    lines = {row["method"] for row in json.loads((folder / "addons_measured.json").read_text(encoding="utf-8"))}
    prompts = (folder / "prompts_caltech101.md").read_text(encoding="utf-8")
    rows = {name.replace("\\", "") for name in re.findall(r"^\| ([\w\\]+)", prompts, re.MULTILINE)}
    assert {"coop", "prompt_src"} <= rows
    assert addon_rows().keys() - lines - rows == set()


def test_links_to_files_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_blocks_are_read_as_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "folder")
    text = (
        "<!-- runs: s; short: --set run.steps=2 -->\n```sh\n"
        "vlkit train a.toml \\\n    --resume  # a remark\n\nvlkit shards build $DATA/x --out 'my shards'\n```\n"
        "<!-- not run: long -->\n```sh\nmake test\n```\n<!-- runs: s -->\n```python\nx = 1\n```\n"
    )
    first, second = stories(text)["s"]
    assert list(commands(first)) == [
        ["train", "a.toml", "--resume", "--set", "run.steps=2"],
        ["shards", "build", "folder/x", "--out", "my shards"],
    ]
    assert (second.language, second.code) == ("python", "x = 1\n")


def test_every_block_runs_or_says_why_not() -> None:
    assert unheaded(README) == []
    assert unheaded("Some text.\n```sh\nvlkit info\n```\n") == ["vlkit info"]


def picture(seed: int) -> bytes:
    """A JPEG of 48 x 40 pixels, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((48, 40)).save(file, "JPEG")
    return file.getvalue()


def captions(seed: int) -> list[str]:
    return [f"picture {seed} of a {kind}" for kind in ("dog", "red dog", "small dog", "dog outside", "dog at rest")]


def flickr8k(folder: Path) -> None:
    """Images/, the token file with its one image that does not exist, the split lists, the Karpathy file."""
    (folder / "Images").mkdir(parents=True)
    splits = {"train": range(24), "dev": range(24, 32), "test": range(32, 40)}
    tokens, entries = [], []
    for split, seeds in splits.items():
        for seed in seeds:
            (folder / "Images" / f"{seed}.jpg").write_bytes(picture(seed))
            tokens += [f"{seed}.jpg#{k}\t{text}" for k, text in enumerate(captions(seed))]
            sentences = [{"raw": text, "tokens": text.split()} for text in captions(seed)]
            karpathy = {"train": "train", "dev": "val", "test": "test"}[split]
            entries.append({"filename": f"{seed}.jpg", "split": karpathy, "imgid": seed, "sentences": sentences})
        (folder / f"Flickr_8k.{split}Images.txt").write_text("".join(f"{seed}.jpg\n" for seed in seeds))
    tokens.append("gone.jpg#0\tan image that does not exist")
    (folder / "Flickr8k.token.txt").write_text("\n".join(tokens) + "\n")
    (folder / "dataset_flickr8k.json").write_text(json.dumps({"dataset": "flickr8k", "images": entries}))


def coco(folder: Path) -> None:
    """val2017/ and annotations/captions_val2017.json."""
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images = [{"id": seed, "file_name": f"{seed:012d}.jpg", "width": 48, "height": 40} for seed in range(8)]
    for image in images:
        (folder / "val2017" / str(image["file_name"])).write_bytes(picture(int(image["id"])))
    texts = [(seed, text) for seed in range(8) for text in captions(seed)]
    notes = [{"id": number, "image_id": seed, "caption": text} for number, (seed, text) in enumerate(texts)]
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": notes}))


def class_folders(folder: Path, names: tuple[str, ...]) -> None:
    for position, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            (folder / name / f"image_{number:04d}.jpg").write_bytes(picture(10 * position + number))


if __name__ == "__main__":  # make readme
    written = _MEASURED.sub(lambda _: measured_table(), _TABLE.sub(lambda _: methods_table(), README))
    (ROOT / "README.md").write_text(written, encoding="utf-8")
