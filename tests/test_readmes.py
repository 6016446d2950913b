"""Every command, flag, file and link that a README names exists, and README.md is short.

Commands are read by the scripts' own flags, in this process; nothing is run. `.ci/run` and the scripts' tests run them.
"""

import argparse
import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from scripts import DENSE, EXPERIMENTS, SCRIPTS, load_script, parse_command, write_model_folder

from experiments.shared import common, loading
from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.planner import Cluster
from moejax.profiling.capture import TRIGGER
from moejax.train.plan_file import write_plan_file

ROOT = Path(__file__).resolve().parents[1]
MARKDOWN = sorted(
    path.relative_to(ROOT)
    for path in [*ROOT.rglob("*.md"), *ROOT.glob(".github/*.md")]
    if path.parent.name == ".github"
    or not any(part.startswith(".") or part in ("site-packages", "runs") for part in path.relative_to(ROOT).parts)
)
READMES = [path for path in MARKDOWN if path.name == "README.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
PROGRAMS = ("python ", "pytest", "pip ", "tensorboard ", "srun ")


def blocks(path, language):
    return [code for found, code in BLOCK.findall((ROOT / path).read_text()) if found == language]


def inline_code(path):
    return CODE.findall(BLOCK.sub("", (ROOT / path).read_text()))


def commands(path):
    """Returns the commands of a README's blocks of sh, and those in its text, as words."""
    lines = "\n".join(blocks(path, "sh")).replace("\\\n", " ").splitlines()
    lines += [code for code in inline_code(path) if code.startswith(PROGRAMS) and not code.startswith("pytest.")]
    words = [word for line in lines for word in [*shlex.split(line, comments=True), "&&"]]
    found = [[]]
    for word in words:
        if word == "&&":
            found.append([])
        else:
            found[-1].append(word)
    return [command for command in found if command]


COMMANDS = sorted({tuple(command) for path in READMES for command in commands(path)})


def test_there_are_readmes_and_commands():
    folders = ("balance", "data", "dispatch", "interop", "planner", "profiling", "train")
    assert {Path("moejax", folder, "README.md") for folder in folders} < set(READMES)
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_is_understood(command, tmp_path, monkeypatch, pytestconfig):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_plan_file("plan.py", (Layout(MeshConfig(16), 64, 32),), "moe_16x10b", "What plan.py wrote.")
    write_model_folder(tmp_path / "models" / "mixtral")
    write_model_folder(tmp_path / "models" / "llama", DENSE)
    check_command(list(command), pytestconfig)


def check_command(words, pytestconfig):
    match words:
        case ["srun", "--nodes=2", "--ntasks-per-node=1", *rest]:
            check_command(rest, pytestconfig)
        case ["python", script, *arguments]:
            name = script.removeprefix("experiments/").removesuffix(".py")
            assert script == f"experiments/{name}.py"
            assert name in SCRIPTS
            parse_command(name, arguments)
        case ["pip", "install", "-e", target]:
            extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", target)[1]
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(extras.split(",") if extras else []) <= set(known)
        case ["pytest", *arguments]:
            check_pytest(arguments, pytestconfig)
        case ["tensorboard", logdir]:
            assert logdir.startswith("--logdir=runs")
        case ["echo", number, ">", file]:
            assert int(number) > 0
            assert Path(file).name == TRIGGER
        case _:
            raise AssertionError(f"no test knows this command: {shlex.join(words)}")


def check_pytest(arguments, pytestconfig):
    """Checks that the files exist, and that those selected by a marker have it."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    for option in ("-m", "-n", "-k"):
        parser.add_argument(option, default="")
    parser.add_argument("paths", nargs="*")
    asked = parser.parse_args(arguments)
    marks = set(re.findall(r"\w+", asked.m)) - {"and", "or", "not"}
    assert marks <= {line.partition(":")[0] for line in pytestconfig.getini("markers")}
    for path in asked.paths:
        assert (ROOT / path).exists()
        assert "not" in asked.m.split() or all(f"mark.{mark}" in (ROOT / path).read_text() for mark in marks)


@pytest.mark.parametrize("path", READMES, ids=str)
def test_flags_and_names_in_the_text_exist(path):
    scripts = map(load_script, SCRIPTS)
    known = {name for script in scripts for name in script.FLAGS} | {"help"}
    text = " ".join(inline_code(path))
    assert set(re.findall(r"--(?:config|mesh)\.[\w.]*\w", text)) <= set(common.field_paths())
    assert {name for name in re.findall(r"--(\w+)", text) if name not in ("config", "mesh")} <= known
    assert set(re.findall(r"--mesh=(\w+)", text)) <= {*loading.mesh_names()}
    assert set(re.findall(r"--plan=(\w+)", text)) <= {*loading.plan_names(), "plan"}
    assert set(re.findall(r"--config=(\w+)", text)) <= set(loading.config_names())


@pytest.mark.parametrize("path", READMES, ids=str)
def test_files_in_the_text_exist_and_tables_of_files_are_complete(path):
    folder = ROOT / path.parent
    files = {code for code in inline_code(path) if re.fullmatch(r"[\w/*]+\.(py|md)", code)}
    for name in files - {"plan.py", "report.md"}:  # which commands write
        places = (folder, ROOT, EXPERIMENTS)
        assert any(list(place.glob(name)) for place in places), name
    if "\n## Files\n" in (ROOT / path).read_text():
        listed = {file for name in files for file in folder.glob(name)}
        assert listed >= {file for file in folder.glob("*.py") if file.stem != "__init__"}


def test_the_map_is_complete():
    (tree,) = [code for code in blocks("README.md", "") if code.startswith("moejax/\n")]
    named = re.findall(r"[\w/]+(?:\.py|/)", tree)
    assert all((ROOT / name).exists() or (ROOT / "moejax" / name).exists() for name in named)
    assert tree.splitlines()[1].split()[0] == "model.py"
    folders = {file.parent.name for file in (ROOT / "moejax").glob("*/__init__.py")}
    assert folders <= {name.rstrip("/") for name in named}


@pytest.mark.parametrize("path", MARKDOWN, ids=str)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", (ROOT / path).read_text())):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / path).parent / file if file else ROOT / path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", target.read_text()), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], link


@pytest.mark.parametrize("path", READMES, ids=str)
def test_python_in_readmes_is_whole(path):
    for code in blocks(path, "python"):
        ast.parse(code)
        names = {}
        if "\ndef get_" in code:
            exec(code, names)
            made = names.get("get_cluster", names.get("get_config"))()
            assert isinstance(made, Cluster | MeshConfig)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1300


def test_the_measured_run_is_what_a_run_prints():
    (output,) = [code for code in blocks("README.md", "") if "step 1/" in code]
    labels = re.findall(r"^  (\w.*?)  +\S", output, re.MULTILINE)
    source = (ROOT / "moejax" / "train" / "summary.py").read_text()
    assert labels
    assert all(f'"{label}": ' in source for label in labels)
    assert re.search(r"^step \d+/\d+  loss [\d.]+  .*tokens/s  CV [\d.]+", output, re.MULTILINE)
