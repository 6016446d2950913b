"""Imports inside the package run one way, from `checks` up to `train`; this reads them and holds them to it.

A new top-level module or package of moejax fails here until it has a place in LAYERS.
"""

import ast
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import moejax

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moejax"

# Lowest first. A module imports from lower layers, and from itself if it is a package; not from its own layer.
LAYERS = (
    {"checks", "strict_json"},
    {"config"},
    {"cache", "compiler"},
    {"mesh", "overrides", "topology", "hlo", "plots"},
    {"presets", "remat", "runtime", "layout"},
    {"sharding"},
    {"kernels"},
    {"nn"},
    {"dispatch", "balance"},
    {"moe"},
    {"pipeline"},
    {"batch"},
    {"metrics"},
    {"model", "data"},
    {"program"},
    {"interop"},
    {"modules", "train", "planner", "serve"},
    {"profiling"},
)
ONLY = {"data": {"cache", "checks", "config"}}  # narrower than the layers say
OUTSIDE = {"experiments", "mesh_configs", "tests"}  # what uses the package is not used by it
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imported(source, module, is_package):
    """Absolute names of the modules that `source`, the text of `module`, imports anywhere in it."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(relative, package) if node.level else node.module
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(source, module, is_package=False):
    """What `source`, the text of `module`, imports against the rule."""
    importer = module.split(".")[1] if "." in module else ""
    if importer and importer not in RANK:
        yield f"{module}: moejax.{importer} has no place in LAYERS of tests/test_imports.py"
        return
    for name in imported(source, module, is_package):
        parts = name.split(".")
        if parts[0] in OUTSIDE:
            yield f"{module} imports {name}: the package never imports {parts[0]}"
        if parts[0] != "moejax" or importer in ("", parts[1] if len(parts) > 1 else None):
            continue  # not ours, or the public names in moejax/__init__.py, or a package's own parts
        target = parts[1] if len(parts) > 1 else ""
        allowed = ONLY.get(importer, {other for other in RANK if RANK[other] < RANK[importer]})
        if target not in allowed:
            yield f"{module} imports {name}: moejax.{importer} may import {', '.join(sorted(allowed)) or 'nothing'}"


def find_modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        yield path, ".".join(parts[:-1] if is_package else parts), is_package


MODULES = list(find_modules())
SCRIPTS = sorted((ROOT / "experiments").rglob("*.py"))


@pytest.mark.parametrize(("path", "module", "is_package"), MODULES, ids=[module for _, module, _ in MODULES])
def test_imports_run_one_way(path, module, is_package):
    assert list(violations(path.read_text(), module, is_package)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("moejax.config", "from moejax.mesh import MeshConfig"),
        ("moejax.mesh", "from moejax.overrides import apply_overrides"),
        ("moejax.nn.experts", "from moejax.dispatch import capacity"),
        ("moejax.nn.experts", "from ..dispatch.capacity import dispatch"),
        ("moejax.nn.experts", "from .. import dispatch"),
        ("moejax.nn.experts", "import moejax.dispatch.capacity as capacity"),
        ("moejax.nn.experts", "def f():\n    from moejax import dispatch"),
        ("moejax.nn.experts", "import moejax"),
        ("moejax.balance", "from moejax.dispatch import capacity"),
        ("moejax.data.loader", "from moejax.mesh import EXPERT"),
        ("moejax.layout", "from moejax.sharding import Param"),
        ("moejax.model", "from moejax.program import Program"),
        ("moejax.model", "from moejax.train.step import step"),
        ("moejax.planner.search", "from moejax.train.schedule import Schedule"),
        ("moejax.planner.search", "from moejax.profiling.step_counts import count_step"),
        ("moejax.train.loop", "from moejax.planner import predict"),
        ("moejax.model", "from experiments.shared.common import run"),
        ("moejax.train.loop", "import mesh_configs.single"),
        ("moejax", "import experiments"),
        ("moejax.misc", "import jax"),
        ("moejax.misc.more", ""),
    ],
)
def test_wrong_imports_are_found(module, source):
    assert list(violations(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("moejax.mesh", "import jax\nfrom moejax.config import check"),
        (
            "moejax.nn.experts",
            "from . import norm\nfrom moejax.nn.norm import rms_norm\nfrom ..kernels import attention",
        ),
        ("moejax.data.loader", "from moejax.config import DataConfig\nfrom moejax.data import corpus"),
        ("moejax.train.loop", "from moejax.data import loader\nfrom moejax.model import loss"),
        ("moejax.sharding", "from moejax.layout import Layout"),
        ("moejax.program", "from moejax.model import loss"),
        ("moejax.planner.search", "from moejax import program"),
        ("moejax.profiling.report", "from moejax.planner.predict import predict_step"),
        ("moejax", "from moejax.train import fit"),
    ],
)
def test_right_imports_pass(module, source):
    assert list(violations(source, module)) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_script_imports_is_there(script):
    """Found by reading the script, so that imports inside functions count."""
    for name in imported(script.read_text(), script.stem, is_package=False):
        if name.split(".")[0] in ("moejax", "experiments"):
            assert pkgutil.resolve_name(name) is not None


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_script_hides_a_module_of_the_standard_library(script):
    """A script's folder comes first on Python's path, so `experiments/profile.py` would be what `cProfile` imports."""
    assert script.stem not in sys.stdlib_module_names


def test_public_names_are_there():
    assert all(getattr(moejax, name) is not None for name in moejax.__all__)
    assert set(moejax.__all__) <= set(dir(moejax))
    with pytest.raises(AttributeError, match="module 'moejax' has no attribute 'nothing'"):
        _ = moejax.nothing


def test_type_checkers_see_the_names_that_are_imported_when_asked_for():
    branches = [node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If)]
    imports = [node for branch in branches for node in branch.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == moejax._MODULES


@pytest.mark.full
def test_importing_every_module_starts_no_device():
    names = [module for _, module, _ in MODULES]
    program = (
        "import importlib, jax\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    jax.config.update('jax_num_cpu_devices', 1 + jax.config.jax_num_cpu_devices % 2), name\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
