"""A plan's file reads back, and is written as a person would write it."""

import pytest

from experiments.shared import loading
from moejax.checks import ConfigError
from moejax.config import DispatchConfig
from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.train.plan_file import load_layouts, load_plan_model, write_plan_file

LAYOUTS = (Layout(seq_len=32), Layout(seq_len=64), Layout(seq_len=128))
WRITTEN = '''"""A plan.

For a test.
"""

from moejax.config import DispatchConfig
from moejax.layout import Layout
from moejax.mesh import MeshConfig


def get_layouts() -> tuple[Layout, ...]:
    return (
        Layout(
            mesh=MeshConfig(expert=8, pipeline=2, tensor=1, replica=1, hardware="cpu", hosts=1, host_axis="expert"),
            seq_len=1024,
            batch_size=8,
            grad_accumulation_steps=1,
            num_microbatches=1,
            pipeline_repeats=1,
            gather="step",
            remat="auto",
            bubble="auto",
            batch_split=0,
            dispatch=DispatchConfig(
                strategy="dropless",
                capacity_factor=1.5,
                expert_axes=("expert",),
                hierarchical=False,
                chunks=1,
                wire_dtype="compute",
            ),
        ),
    )


def get_model() -> str:
    return "mixed"
'''


def test_written_and_read_back(tmp_path):
    path = tmp_path / "plan.py"
    long = Layout(
        MeshConfig(8, 1, 2, hardware="a100_64gb", hosts=2, host_axis="expert"),
        10_240,
        32,
        grad_accumulation_steps=2,
        num_microbatches=4,
        gather="layer",
        remat="collectives",
        batch_split=2,
        dispatch=DispatchConfig("ragged", 1.25, ("expert",), hierarchical=True, chunks=4, wire_dtype="float8"),
    )
    layouts = (long.replace(seq_len=128, grad_accumulation_steps=1), long)
    model = '/models/of "mine"/small \N{GRINNING FACE}\udcff.py'  # with a byte that is no Unicode
    write_plan_file(path, layouts, model, "Written by a test: two layouts.")
    assert load_layouts(path) == layouts
    assert load_plan_model(path) == model
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 120
    write_plan_file(path, layouts, model, "Written by a test: two layouts.")
    assert path.read_text() == text


def test_the_text_is_as_ruff_formats_it(tmp_path):
    layout = Layout(MeshConfig(8, 2), 1024, 8, num_microbatches=1, dispatch=DispatchConfig(expert_axes=("expert",)))
    write_plan_file(tmp_path / "plan.py", (layout,), "mixed", "A plan.\n\nFor a test.")
    assert (tmp_path / "plan.py").read_text() == WRITTEN


@pytest.mark.parametrize("name", loading.plan_names())
def test_those_in_mesh_configs_are_plans_for_a_model(name, tmp_path):
    path = loading.PLANS / f"{name}.py"
    layouts, model = load_layouts(path), load_plan_model(path)
    assert model in loading.config_names()
    for layout in layouts:
        layout.check(loading.load_model(model))
    write_plan_file(tmp_path / "plan.py", layouts, model, "As in mesh_configs.")
    assert load_layouts(tmp_path / "plan.py") == layouts


def test_there_is_a_named_plan():
    assert "cpu_16_mixed" in loading.plan_names()


def test_a_mesh_file_has_no_layouts_and_no_model():
    path = loading.MESH_CONFIGS / "cpu_16.py"
    with pytest.raises(ConfigError, match=r"cpu_16\.py has no get_layouts\(\); a mesh file goes with --mesh"):
        load_layouts(path)
    assert load_plan_model(path) is None


@pytest.mark.parametrize(
    ("layouts", "message"),
    [
        ((), r"layouts=\(\) must hold one"),
        (LAYOUTS[::-1], r"seq_len=\[128, 64, 32\], which must ascend"),
        ((LAYOUTS[0], Layout(MeshConfig(8), 64)), r"mesh.num_devices=\[1, 8\], which must be the same"),
        ((LAYOUTS[0], LAYOUTS[1].replace(mesh=MeshConfig(hardware="h100"))), r"mesh.hardware=\['cpu', 'h100'\], which"),
    ],
)
def test_layouts_that_cannot_go_together(tmp_path, layouts, message):
    with pytest.raises(ConfigError, match=message):
        write_plan_file(tmp_path / "plan.py", layouts, "tiny", "A plan.")
    imports = "from moejax import DispatchConfig, Layout, MeshConfig\n"
    (tmp_path / "plan.py").write_text(f"{imports}get_layouts = lambda: {layouts}\n")
    with pytest.raises(ConfigError, match=message if layouts else r"get_layouts\(\) returned \(\); it must return"):
        load_layouts(tmp_path / "plan.py")


def test_a_title_that_is_no_docstring_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"title='one.*quotes"):
        write_plan_file(tmp_path / "plan.py", LAYOUTS, "tiny", 'one "quoted" line')


def test_a_model_without_a_name_is_refused(tmp_path):
    (tmp_path / "plan.py").write_text("def get_model():\n    return 3\n")
    with pytest.raises(ConfigError, match=r"get_model\(\) returned 3; it must return a name"):
        load_plan_model(tmp_path / "plan.py")


def test_a_file_that_returns_something_else(tmp_path):
    (tmp_path / "plan.py").write_text("def get_layouts():\n    return [1]\n")
    with pytest.raises(ConfigError, match=r"get_layouts\(\) returned \[1\]; it must return a tuple of Layouts"):
        load_layouts(tmp_path / "plan.py")


@pytest.mark.parametrize("name", ["ParallelConfig", "TrainConfig"])
def test_a_plan_of_version_0_1_is_one_line(tmp_path, name):
    (tmp_path / "plan.py").write_text(f"from moejax.config import DispatchConfig, {name}\n")
    with pytest.raises(ConfigError, match=rf"plan\.py: moejax\.config\.{name} is .*now") as error:
        load_layouts(tmp_path / "plan.py")
    assert "\n" not in str(error.value)
