"""The walls between the rooms: who may import whom, what stays free of torch, and what a bare installation can import.

The rules are read from the syntax tree, so an import inside a function or under TYPE_CHECKING counts like any other.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PURE = ["parallel.schedule", "parallel.eplb"]
ROOMS: dict[str, list[str]] = {
    "config": [],
    "parallel.schedule": [],
    "parallel.eplb": [],
    "planner": ["config", "parallel.schedule"],
    "ops": ["config"],
    "data": ["config"],
    "rewards": ["config", "data"],
    "model": ["config", "ops"],
    "quant": ["config", "ops", "model"],
    "parallel": ["config", "ops", "model", *PURE],
    "train": ["config", "ops", "model", "parallel", "quant", "data", *PURE],
    "engine": ["config", "ops", "model", "parallel", "quant", "data", *PURE],
    "eval": ["config", "model", "engine", "data", "rewards"],
    "rl": ["config", "ops", "model", "parallel", "quant", "data", "rewards", "train", "engine", "eval", *PURE],
    "server": ["config", "data", "engine"],
}
BELOW_RECIPES = list(ROOMS)
ROOMS["recipes"] = BELOW_RECIPES
ROOMS["claims"] = BELOW_RECIPES
LIBRARY = list(ROOMS)
ROOMS["presets"] = [*LIBRARY, "commands", "root"]
ROOMS["commands"] = [*LIBRARY, "presets", "root"]
ROOMS["cli"] = [*LIBRARY, "presets", "commands", "root"]
ROOMS["root"] = ["config", "model", "engine"]  # the public names, found on first use
ROOMS["__main__"] = ["cli"]

NEVER_TORCH = {"config", "parallel.schedule", "parallel.eplb", "planner"}  # besides every room's config.py
FAST_TO_IMPORT = {"root", "cli", "presets", "commands"}  # `--help` imports these: torch only inside functions
HANDED_ON = {"finback.rewards": ["run_code"]}  # public under that name; its module imports the standard library only
HANDED_ON_LATER = {"finback.ops"}  # public names whose modules import torch: found on first use, as the root's
BRINGS_TORCH = {"torch", "transformers", "safetensors.torch", "triton"}


@dataclass(frozen=True)
class Import:
    """One imported name of a module: `target` is absolute and as deep as the statement says."""

    target: str
    line: int
    at_import: bool  # runs when the module is imported: neither inside a function nor under TYPE_CHECKING
    at_run: bool  # runs at all: not under TYPE_CHECKING


@dataclass(frozen=True)
class Module:
    """A source file of the package, and what it imports."""

    name: str  # "finback.model.mla"; a package's __init__ goes by the package's name
    path: Path
    imports: tuple[Import, ...]

    @property
    def is_config(self) -> bool:
        return self.path.name == "config.py"


def room_of(name: str) -> str | None:
    """The room that a module (or a name inside one) of ours belongs to; None for other people's packages.

    The room `config` is several modules: config.py and what it is cut into, config_*.py.
    """
    parts = name.split(".")
    if parts[0] != "finback":
        return None
    if len(parts) > 1 and parts[1].startswith("config_"):
        return "config"
    if ".".join(parts[1:3]) in PURE:
        return ".".join(parts[1:3])
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "root"


def read_modules(root: Path) -> dict[str, Module]:
    """Every module under `root`/finback by name."""
    modules = {}
    for path in sorted((root / "finback").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        package = parts[:-1]
        name = ".".join(package if parts[-1] == "__init__" else parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules[name] = Module(name, path, tuple(_imports(tree, package)))
    return modules


def _imports(tree: ast.AST, package: tuple[str, ...], at_import: bool = True, at_run: bool = True) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        for target in _targets(node, package):
            yield Import(target, node.lineno, at_import and at_run, at_run)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from _imports(ast.Module(node.body, []), package, at_import, at_run=False)
            yield from _imports(ast.Module(node.orelse, []), package, at_import, at_run)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(node, package, at_import and not inside, at_run)


def _targets(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *filter(None, [node.module])])
            return [f"{prefix}.{alias.name}" for alias in node.names]
        case ast.Call(func=ast.Name(id="import_module" | "__import__"), args=[ast.Constant(value=str(name)), *_]):
            return [name]
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
            return [name]
        case _:
            return []


def violations(root: Path) -> list[str]:
    """Every broken rule under `root`, one sentence each."""
    modules = read_modules(root)
    core = {_import_name(requirement) for requirement in _project(root)["dependencies"]}
    found = []
    for module in modules.values():
        relative = module.path.relative_to(root)
        if module.path.name == "__init__.py" and module.name != "finback" and not _is_bare(module):
            found.append(f"{relative}: __init__.py files are empty but the root's")
        parts = module.name.split(".")
        if len(parts) > 1 and room_of(module.name) != "config" and parts[1] not in {room.split(".")[0] for room in ROOMS}:
            found.append(f"{relative}: {parts[1]} is no room of the table")
            continue
        found.extend(f"{relative}:{line}: {sentence}" for line, sentence in _edge_violations(module))
        found.extend(f"{relative}:{line}: {sentence}" for line, sentence in _package_violations(module, core))
        if module.is_config or room_of(module.name) in NEVER_TORCH | FAST_TO_IMPORT:
            chain = _chain_to_torch(module.name, modules)
            if chain:
                found.append(f"{relative}: importing it imports torch ({' -> '.join(chain)})")
    return found


def _is_bare(module: Module) -> bool:
    """Whether a package's __init__ is empty, or hands on the names that the public surface has there and nothing else."""
    body = ast.parse(module.path.read_text(encoding="utf-8")).body
    if module.name in HANDED_ON_LATER:
        functions = [statement.name for statement in body if isinstance(statement, ast.FunctionDef)]
        return functions == ["__getattr__"] and all(imported.target.split(".")[0] != "finback" for imported in module.imports)
    names = [node.name for statement in body if isinstance(statement, ast.ImportFrom) for node in statement.names]
    expected = HANDED_ON.get(module.name, [])
    return names in ([], expected) and len(body) == (2 if names else 0)


def _edge_violations(module: Module) -> Iterator[tuple[int, str]]:
    room = room_of(module.name)
    for imported in module.imports:
        target = room_of(imported.target)
        if target is not None and target != room and target not in ROOMS[room]:
            yield imported.line, f"{room} must not import {target} ({imported.target})"


def _package_violations(module: Module, core: set[str]) -> Iterator[tuple[int, str]]:
    """Rules about other people's packages: no torch where it must not be, optional ones only inside functions."""
    room = room_of(module.name)
    kernels = module.name.startswith("finback.ops.triton")
    for imported in module.imports:
        package = imported.target.split(".")[0]
        if package in sys.stdlib_module_names or package == "finback":
            continue
        if imported.at_run and _brings_torch(imported.target) and (room in NEVER_TORCH or module.is_config):
            yield imported.line, f"{module.name} must not import {imported.target}, not even inside a function"
        if room == "ops" and not kernels and package not in ("torch", "numpy"):
            yield imported.line, f"ops needs torch and numpy only, not {package}"
        home = (kernels and package == "triton") or room == "server"
        if imported.at_import and package not in core and not home:
            yield imported.line, f"{package} is optional: import it inside the function that needs it"
        if imported.at_import and package == "triton" and not kernels:
            yield imported.line, "triton is imported in finback.ops.triton only"


def _brings_torch(target: str) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in BRINGS_TORCH)


def _chain_to_torch(name: str, modules: dict[str, Module]) -> list[str]:
    """A path of import-time imports from `name` to torch, or an empty list."""
    paths, seen = [[name]], {name}
    while paths:
        path = paths.pop()
        for imported in modules[path[-1]].imports:
            if not imported.at_import:
                continue
            if _brings_torch(imported.target):
                return [*path, imported.target]
            for step in _executed_by(imported.target, modules):
                if step not in seen:
                    seen.add(step)
                    paths.append([*path, step])
    return []


def _executed_by(target: str, modules: dict[str, Module]) -> list[str]:
    """The modules of ours that importing `target` runs: itself and every package above it."""
    parts = target.split(".")
    prefixes = (".".join(parts[: end + 1]) for end in range(len(parts)))
    return [prefix for prefix in prefixes if prefix in modules]


def _project(root: Path) -> dict[str, list[str]]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _import_name(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0].replace("-", "_")


def test_the_package_keeps_its_walls():
    assert violations(ROOT) == []


def test_the_whole_package_was_read():
    modules = read_modules(ROOT)
    assert {"finback", "finback.config", "finback.cli", "finback.commands.doctor"} <= modules.keys()
    assert len(modules) == len(list((ROOT / "finback").rglob("*.py")))


@pytest.mark.parametrize(
    ("path", "source", "sentence"),
    [
        ("model/a.py", "from finback.parallel import mesh", "model must not import parallel"),
        ("model/a.py", "def f():\n    import finback.train.loop", "model must not import train"),
        ("model/a.py", "if TYPE_CHECKING:\n    from finback.train import x", "model must not import train"),
        ("model/a.py", "import finback", "model must not import root"),
        ("model/a.py", "from finback import InputError", "model must not import root"),
        ("train/a.py", "from ..engine import scheduler", "train must not import engine"),
        ("train/a.py", "from .. import engine", "train must not import engine"),
        ("train/a.py", "import importlib\nimportlib.import_module('finback.engine')", "train must not import engine"),
        ("engine/a.py", "from finback.train.metrics import log", "engine must not import train"),
        ("server/a.py", "from finback.model import mla", "server must not import model"),
        ("data/a.py", "from finback.cli import main", "data must not import cli"),
        ("commands/a.py", "from finback.cli import VERBS", "commands must not import cli"),
        ("recipes/a.py", "from finback.commands import fetch", "recipes must not import commands"),
        ("config.py", "from finback.data import x", "config must not import data"),
        ("config_a.py", "from finback.data import x", "config must not import data"),
        ("config_a.py", "def f():\n    import torch", "must not import torch, not even inside a function"),
        ("parallel/schedule.py", "from finback.config import ModelConfig", "parallel.schedule must not import config"),
        ("parallel/eplb.py", "def f():\n    import torch", "must not import torch, not even inside a function"),
        ("planner/a.py", "from finback.parallel.mesh import Mesh", "planner must not import parallel"),
        ("planner/a.py", "def f():\n    import torch.nn", "must not import torch.nn, not even inside a function"),
        ("train/config.py", "from torch import dtype", "must not import torch.dtype, not even inside a function"),
        ("train/config.py", "from finback.model.a import b", "(finback.train.config -> finback.model.a -> torch)"),
        ("commands/a.py", "from finback.model.a import b", "(finback.commands.a -> finback.model.a -> torch)"),
        ("presets.py", "import transformers", "importing it imports torch (finback.presets -> transformers)"),
        ("model/b.py", "import triton", "triton is imported in finback.ops.triton only"),
        ("model/b.py", "import matplotlib.pyplot as plt", "matplotlib is optional"),
        ("data/a.py", "class A:\n    import pyarrow", "pyarrow is optional"),
        ("ops/a.py", "def f():\n    import jaxtyping", "ops needs torch and numpy only, not jaxtyping"),
        ("ops/__init__.py", "from finback.ops.a import f", "__init__.py files are empty"),
        ("rewards/__init__.py", "from finback.rewards.a import f", "__init__.py files are empty"),
        ("rewards/__init__.py", "from finback.rewards.code import run_code\nx = 1\ny = 2", "__init__.py files are empty"),
        ("cellar/a.py", "", "cellar is no room of the table"),
    ],
)  # fmt: skip
def test_a_planted_violation_is_caught(tmp_path: Path, path: str, source: str, sentence: str):
    _plant(tmp_path, {path: source})
    found = violations(tmp_path)
    assert found
    assert all(line.startswith(f"finback/{path}") for line in found)
    assert any(sentence in line for line in found), found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/b.py", "from finback.ops import rms_norm\nfrom ..config import ModelConfig\nimport torch"),
        ("train/a.py", "def f():\n    from matplotlib import pyplot"),
        ("planner/a.py", "from finback.parallel import schedule\nfrom finback.parallel.schedule import simulate"),
        ("parallel/a.py", "from finback.parallel.eplb import rebalance_experts\nfrom . import schedule"),
        ("ops/triton/a.py", "import triton\nimport triton.language as tl"),
        ("server/a.py", "import fastapi"),
        ("config_a.py", "from finback.config import ModelConfig"),
        ("ops/a.py", "from finback.config_a import integer"),
        ("commands/a.py", "import finback\n\ndef main(argv):\n    import torch\n    from finback.model.a import b"),
        ("commands/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("recipes/a.py", "from finback.rl.grpo import loss\nfrom finback.planner.flops import count"),
        ("rewards/__init__.py", "from finback.rewards.code import run_code\n\n__all__ = ['run_code']"),
    ],
)
def test_what_the_table_allows_passes(tmp_path: Path, path: str, source: str):
    _plant(tmp_path, {path: source})
    assert violations(tmp_path) == []


def _plant(root: Path, files: dict[str, str]) -> None:
    (root / "pyproject.toml").write_text('[project]\ndependencies = ["torch>=2", "numpy", "jaxtyping"]\n', encoding="utf-8")
    for path, source in {"__init__.py": "", "model/a.py": "import torch\nb = 1\n", **files}.items():
        target = root / "finback" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source, encoding="utf-8")
