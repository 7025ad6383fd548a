"""Imports go down only: read from the source, also inside functions. The rules are in the package's layout.

    cli > bench > plan, curation > stages > evaluation, environments > steps > rollout, rewards > hf > models, data >
    algorithms, toy, report > tracking > checkpoint > distributed > records, config, errors

Rooms of one rank do not import each other, so there are no cycles between rooms. `hf` stands above `data` because a
pretrained model comes with its tokenizer. `report` reads files alone, and stages refresh it while they train. A file at
the top of the package is the entry of a command unless it is named below.
"""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxrlhf"
RANKS = {
    "errors": 0, "config": 0, "records": 0,
    "distributed": 1,
    "checkpoint": 2,
    "tracking": 3,
    "algorithms": 4, "toy": 4, "report": 4,
    "models": 5, "data": 5,
    "hf": 6,
    "rollout": 7, "rewards": 7,
    "steps": 8,
    "evaluation": 9, "environments": 9,
    "stages": 10,
    "plan": 11, "curation": 11,
    "bench": 12,  # with the plan's closed form
    "cli": 13,
}  # fmt: skip
TOP = 14
BOTTOM = {"errors", "config", "records"}
ONLY = {  # rooms that may import less than their rank allows
    "errors": set(),
    "config": {"errors"},
    "algorithms": {"errors", "records"},
}
HEAVY = {"torch", "datasets", "transformers", "pyarrow", "peft", "tensorflow"}
HEAVY |= {"tensorboard", "wandb", "mlflow", "trackio"}
UNSAFE = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE_KEYWORDS = {"allow_pickle", "trust_remote_code"}


@dataclass(frozen=True)
class Import:
    module: str  # absolute, such as jaxrlhf.models.decoder
    line: int
    on_import: bool  # runs when the importing module is imported


def _imports(tree: ast.Module, module: str, is_package: bool) -> list[Import]:
    """Every module that the source imports, by statement or by name."""
    found: list[Import] = []

    def visit(node: ast.AST, on_import: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            on_import = False
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            on_import = False
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, on_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                above = parts[: len(parts) - node.level + is_package]
                base = ".".join([*above, base]).strip(".")
            # `from package import name` may name a module or something in it: both are looked at.
            found.extend(Import(f"{base}.{alias.name}", node.lineno, on_import) for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append(Import(str(node.args[0].value), node.lineno, on_import))
        for child in ast.iter_child_nodes(node):
            visit(child, on_import)

    visit(tree, True)
    return found


def _room(parts: list[str], folders: set[str]) -> str:
    """The room of a module below the package; `top`: `train`, `__main__`, or the package itself."""
    return parts[0] if parts and (parts[0] in RANKS or parts[0] in folders) else "top"


def violations(root: Path) -> list[str]:
    """One line for each import under `root` that breaks a rule."""
    found = []
    folders = {path.name for path in root.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    found += [f"{folder}/: no rank; give it one in RANKS" for folder in sorted(folders - set(RANKS))]
    for file in sorted(root.rglob("*.py")):
        parts = list(file.relative_to(root).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        module = ".".join(["jaxrlhf", *(parts[:-1] if is_package else parts)])
        tree = ast.parse(file.read_text(encoding="utf-8"))
        here = _room(module.split(".")[1:], folders)
        for imported in _imports(tree, module, is_package):
            where = f"{file.relative_to(root)}:{imported.line}: {imported.module}"
            top, *rest = imported.module.split(".")
            if top == "jaxrlhf":
                found += [f"{where}: {reason}" for reason in _wrong_way(here, _room(rest, folders))]
            if top in UNSAFE:
                found.append(f"{where}: reads or writes pickles")
            if top in HEAVY and imported.on_import:
                found.append(f"{where}: is heavy; import it inside the function that uses it")
            if here == "config" and top not in {*sys.stdlib_module_names, "pydantic", "ruamel", "jaxrlhf"}:
                found.append(f"{where}: settings need pydantic and ruamel only")
        for call in ast.walk(tree):
            for keyword in getattr(call, "keywords", []):
                if keyword.arg in UNSAFE_KEYWORDS and ast.unparse(keyword.value) != "False":
                    found.append(f"{file.relative_to(root)}:{keyword.value.lineno}: {keyword.arg} must be False")
    return found


def _wrong_way(here: str, there: str) -> list[str]:
    """Why a module of the room `here` may not import one of `there`; empty if it may."""
    if here == there:
        return []
    if here in ONLY and there not in ONLY[here]:
        return [f"{here} may import only {', '.join(sorted(ONLY[here])) or 'nothing of the package'}"]
    own, other = RANKS.get(here, TOP), RANKS.get(there, TOP)
    if other > own:
        return [f"{here} imports {there}, which is above it"]
    if other == own and there not in BOTTOM:
        return [f"{here} imports {there}, which is beside it"]
    return []


def test_imports_go_down_only():
    assert violations(PACKAGE) == []


def test_every_import_names_what_is_there():
    """Also in tests and benchmarks: no import is left of a module that has moved."""
    root, missing = PACKAGE.parent, []
    for file in sorted(f for folder in ("jaxrlhf", "tests", "benchmarks") for f in (root / folder).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for name in sorted({i.module for i in _imports(tree, "jaxrlhf", True) if i.module.startswith("jaxrlhf.")}):
            above, _, last = name.rpartition(".")
            module, package = (root.joinpath(*name.split(".")), root.joinpath(*above.split(".")))
            there = module.with_suffix(".py").exists() or module.is_dir() or package.with_suffix(".py").exists()
            if not there and not (package.is_dir() and last in (package / "__init__.py").read_text()):
                missing.append(f"{file.relative_to(root)}: {name}")
    assert not missing


def test_the_walk_sees_the_package():
    names = {file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py")}
    assert {"config/run.py", "checkpoint/checkpoints.py", "models/decoder.py"} <= names
    tree = ast.parse((PACKAGE / "checkpoint" / "checkpoints.py").read_text())
    modules = {i.module for i in _imports(tree, "jaxrlhf.checkpoint.checkpoints", False)}
    assert {"jax", "orbax.checkpoint.v1", "jaxrlhf.errors.UserError"} <= modules


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("models/a.py", "from jaxrlhf.stages.ppo.stage import run", "models imports stages, which is above it"),
        ("models/a.py", "from jaxrlhf import stages", "models imports stages, which is above it"),
        ("models/a.py", "import jaxrlhf.stages.ppo.stage as p", "models imports stages, which is above it"),
        ("models/a.py", "import jaxrlhf", "models imports top, which is above it"),
        ("models/a.py", "from jaxrlhf import train", "models imports top, which is above it"),
        ("models/a.py", "from ..stages import ppo", "models imports stages, which is above it"),
        ("models/a.py", "from .. import stages", "models imports stages, which is above it"),
        ("models/__init__.py", "from ..stages import ppo", "models imports stages, which is above it"),
        ("models/a.py", "def f():\n    from jaxrlhf.stages import ppo", "models imports stages, which is above it"),
        ("models/a.py", "class A:\n  def f(self):\n    import jaxrlhf.steps", "models imports steps, which is above"),
        ("models/a.py", "from importlib import import_module as i\nx = importlib.import_module('jaxrlhf.steps.a')",
         "models imports steps, which is above it"),
        ("data/a.py", "from jaxrlhf.models import decoder", "data imports models, which is beside it"),
        ("rewards/a.py", "from jaxrlhf.rollout import decode", "rewards imports rollout, which is beside it"),
        ("stages/a.py", "from jaxrlhf.train import main", "stages imports top, which is above it"),
        ("algorithms/a.py", "from jaxrlhf.config import PPOConfig", "algorithms may import only errors, records"),
        ("algorithms/a.py", "from jaxrlhf.models import decoder", "algorithms may import only errors, records"),
        ("tracking/a.py", "from jaxrlhf.algorithms import masked", "tracking imports algorithms, which is above it"),
        ("checkpoint/a.py", "from jaxrlhf.rollout import decode", "checkpoint imports rollout, which is above it"),
        ("records.py", "from jaxrlhf.models import decoder", "records imports models, which is above it"),
        ("config/run.py", "from jaxrlhf.records import Rollout", "config may import only errors"),
        ("config/run.py", "import jax.numpy as jnp", "settings need pydantic and ruamel only"),
        ("config/run.py", "def f():\n    import jax", "settings need pydantic and ruamel only"),
        ("errors.py", "from jaxrlhf import config", "errors may import only nothing of the package"),
        ("config/reading.py", "from jaxrlhf.models import decoder", "config may import only errors"),
        ("data/a.py", "import torch", "is heavy"),
        ("data/a.py", "try:\n    from datasets import load_dataset\nexcept ImportError:\n    pass", "is heavy"),
        ("train.py", "import wandb.sdk", "is heavy"),
        ("data/a.py", "def f():\n    import pickle", "reads or writes pickles"),
        ("data/a.py", "from pickle import loads", "reads or writes pickles"),
        ("data/a.py", "np.load('x', allow_pickle=True)", "allow_pickle must be False"),
        ("data/a.py", "load('x', trust_remote_code=trust)", "trust_remote_code must be False"),
        ("attic/a.py", "x = 1", "attic/: no rank; give it one in RANKS"),
    ],
)  # fmt: skip
def test_a_planted_violation_is_found(tmp_path, file, source, complaint):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    found = violations(tmp_path)
    assert len(found) == 1 and complaint in found[0] and file.split("/")[0] in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "stages/a.py",
            "from jaxrlhf.steps import ppo\nfrom jaxrlhf.config.reading import x\nfrom . import b",
        ),
        ("train.py", "from jaxrlhf.cli import generate, stages\nfrom jaxrlhf.config.reading import load_config"),
        ("__init__.py", "from jaxrlhf.models.decoder import Decoder"),
        ("data/a.py", "def f():\n    import torch, datasets"),
        ("hf/a.py", "from jaxrlhf.data.tokenizers import load_tokenizer"),
        ("data/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import datasets"),
        ("data/a.py", "np.load('x', allow_pickle=False)"),
        ("records.py", "from jaxrlhf.config import Sampling\nimport jax"),
        ("tracking/a.py", "from jaxrlhf.config import MeshConfig\nfrom jaxrlhf.errors import UserError\nimport orbax"),
        ("rewards/a.py", "from jaxrlhf.models import decoder\nfrom jaxrlhf.rewards.b import c"),
    ],
)
def test_what_is_allowed_is_not_complained_about(tmp_path, file, source):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    assert violations(tmp_path) == []
