"""The rules of the tree, read from the source: who imports whom, who prints, how long a module may be."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("vlkit", "data_tools", "eval")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# A module imports only from those before it. `classify` is the work behind the command of that name.
ORDER = (
    "errors", "escape", "distributed", "engine", "contracts", "settings", "run_sections", "configs", "config",
    "data", "models", "losses", "features", "training", "interpret", "index", "addons", "classify", "cli",
)  # fmt: skip
FORBIDDEN = {("losses", "models")}  # losses come later in the order, but know features only
MAX_LINES = 400

# What a file of the project must not name: folders of somebody's machine, package registries.
# Spelled so that this file does not contain what it looks for.
_PLACES = re.compile(r"/(?:work|root|tmp|home/\w+|Users/\w+)/|pypi\.(?:org|python)|pythonhosted\.|//[^/\s]+/simple\b")
_IGNORED_FOLDERS = {"runs", "shards", "dist", "build", "__pycache__"}


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, later: bool = False) -> Iterator[tuple[str, bool, int]]:
    """Every import as (module, whether it happens later than the import of its own module, line).

    Later are those inside functions, and those under `if TYPE_CHECKING`, which never happen.
    `from vlkit.data import x` counts as `vlkit.data.x`, because x may be a module.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, later, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; name the module in full"
            yield from ((f"{node.module}.{alias.name}", later, node.lineno) for alias in node.names)
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        yield from imports(node, later or for_types or isinstance(node, ast.FunctionDef))


def unit(module: str) -> str | None:
    """The entry of ORDER a module belongs to; None for the public names of `vlkit` itself."""
    package, _, rest = module.partition(".")
    assert package == "vlkit"
    return rest.partition(".")[0] or None


def wrong_imports(path: Path) -> Iterator[str]:
    importer = name_of(path)
    package = importer.partition(".")[0]
    for module, later, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
        place = f"{path.relative_to(ROOT)}:{line} imports {module}"
        target = module.partition(".")[0]
        if module == "eval" and target == "eval":
            yield f"{place}: it hides the builtin; write `from eval.x import y`"
        if target in {"eval", "data_tools"} and package == "vlkit":
            if unit(importer) != "cli" or not later:
                yield f"{place}: only functions of vlkit/cli may"
        elif target == "eval" and package == "data_tools":
            yield f"{place}: eval uses data_tools, not the other way round"
        elif target == "vlkit" and unit(module) in ORDER:
            yield from _wrong_order(package, importer, module, place)


def _wrong_order(package: str, importer: str, module: str, place: str) -> Iterator[str]:
    target = unit(module)
    assert target is not None
    if package != "vlkit":
        if target == "cli":
            yield f"{place}: only the command imports vlkit.cli"
        return
    own = unit(importer)
    # vlkit/__init__.py looks its names up lazily; a file with no place in ORDER has a test of its own.
    if own is None or own not in ORDER:
        return
    if ORDER.index(target) > ORDER.index(own) or (own, target) in FORBIDDEN:
        yield f"{place}: {target} is not for {own}"


def method_folders() -> list[Path]:
    slots = [path for path in (ROOT / "vlkit" / "addons").glob("*") if path.is_dir() and path.name != "__pycache__"]
    folders = [ROOT / "vlkit" / "losses", ROOT / "vlkit" / "models" / "heads", *slots]
    return sorted(folder for folder in folders if folder.is_dir())


def method_files(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in {"__init__", "base", "objective"})


def method_rows(folder: Path) -> list[str]:
    """Keys of the dict literal METHODS in a folder's `__init__.py`."""
    init = folder / "__init__.py"
    for node in ast.parse(init.read_text(encoding="utf-8")).body if init.is_file() else []:
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id == "METHODS" and isinstance(node.value, ast.Dict):
            return sorted(ast.literal_eval(key) for key in node.value.keys if key is not None)
    return []


def requirements(*extras: str) -> set[str]:
    """Names of the distributions that pyproject.toml asks for, with some extras."""
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return {_normal(re.split(r"[^\w.-]", requirement)[0]) for listed in lists for requirement in listed}


def project_files() -> Iterator[Path]:
    """Files that git would carry: no hidden folders but .ci, no build products."""
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part not in {".ci", ".gitignore"} for part in parts)
        if path.is_file() and not hidden and not _IGNORED_FOLDERS & {*parts[:1], *parts[:-1]}:
            yield path


def test_every_folder_of_the_packages_is_in_the_order() -> None:
    found = {path.name if path.is_dir() else path.stem for path in (ROOT / "vlkit").iterdir()}
    assert found - {"__pycache__", "__init__", "py"} <= set(ORDER)


def test_imports_follow_the_order() -> None:
    assert [fault for path in sources() for fault in wrong_imports(path)] == []


def test_the_import_rules_find_what_they_forbid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    written = {
        "vlkit/data/a.py": "from vlkit.models import tower",
        "vlkit/losses/a.py": "from vlkit.models.tower import TextTower",
        "vlkit/training/a.py": "def f():\n    from eval.metrics import recall",
        "vlkit/cli/a.py": "from eval.metrics import recall",
        "vlkit/cli/b.py": "def f():\n    import eval",
        "eval/a.py": "from vlkit.cli.console import say",
        "data_tools/a.py": "from eval.metrics import recall",
    }
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        assert len(list(wrong_imports(tmp_path / name))) == 1, name


def test_only_the_command_prints() -> None:
    faults = []
    for path in sources():
        if name_of(path).startswith("vlkit.cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            printing = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            attribute = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if printing or attribute in {"logging.basicConfig", "sys.stdout", "sys.stderr"}:
                faults.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert faults == []


def test_no_module_is_too_long() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_module_names() -> None:
    taken = sys.stdlib_module_names | {"utils"}
    assert [name_of(path) for path in sources() if path.stem in taken] == []
    assert [folder for package in PACKAGES for folder in (ROOT / package).rglob("*") if folder.name in taken] == []
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_every_method_has_a_row_and_a_test() -> None:
    for folder in method_folders():
        files = method_files(folder)
        tests = ROOT / "tests" / folder.relative_to(ROOT / "vlkit")
        assert method_rows(folder) == files, f"METHODS in {folder.relative_to(ROOT)}/__init__.py"
        assert [stem for stem in files if not (tests / f"test_{stem}.py").is_file()] == [], f"no test in {tests}"


def test_everything_imported_is_declared() -> None:
    declared = requirements(*PROJECT["optional-dependencies"])
    offered_by = packages_distributions()
    faults = []
    for path in sources():
        for module, _, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
            top = module.partition(".")[0]
            if top in PACKAGES or top in sys.stdlib_module_names:
                continue
            if not declared & {_normal(name) for name in offered_by.get(top, [top])}:
                faults.append(f"{path.relative_to(ROOT)}:{line} imports {top}, which pyproject.toml does not declare")
    assert faults == []


def test_everything_installed_by_make_env_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {_normal(line.partition("==")[0]) for line in lines if not line.startswith("#")}
    assert requirements("dev", "heif", "ray") - {"vlkit"} <= pinned
    assert [line for line in lines if "://" in line or (line[0] != "#" and "==" not in line)] == []


def test_no_file_names_a_machine_or_a_registry() -> None:
    faults = []
    for path in project_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # a picture
            continue
        faults += [f"{path.relative_to(ROOT)}: {line.strip()}" for line in lines if _PLACES.search(line)]
    assert faults == []


def test_help_imports_nothing_heavy() -> None:
    heavy = {"torch", "torchvision", "open_clip", "transformers", "timm", "sklearn", "matplotlib", "pyarrow", "faiss"}
    script = (
        "import sys\nfrom vlkit.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as leaving:\n    assert leaving.code == 0\n"
        f"print('heavy:', sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Commands:" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy: []"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
