"""Restoration is bit-identical, onto other meshes too; all damage is found; a kill loses one checkpoint at most."""

import asyncio
import dataclasses
import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax.checks import ConfigError
from moejax.train import checkpoint, orbax_workarounds
from moejax.train.checkpoint import Checkpointer, CheckpointError
from moejax.train.orbax_workarounds import reason
from moejax.train.reshard import restackable

NUM_LAYERS = 5  # which leaves places of most stacks empty
ODD_BITS = np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0x80000000, 1, 0x3F800000, 0, 2], np.uint32)  # NaNs, inf, -0
METADATA = {"layout": {"stages": 2, "repeats": 1}, "config": {"name": "tiny", "rate": 3e-4}, "none": None}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: Any
    params: Any
    opt_state: Any


def make_mesh(shape, axis_type=AxisType.Auto):
    devices = jax.devices()[: np.prod(shape)]
    return jax.make_mesh(shape, ("expert", "pipeline", "tensor"), axis_types=(axis_type,) * 3, devices=devices)


def make_state(mesh, repeats=1, seed=0):
    """A state whose logical values depend on the seed alone, its layers stacked for the mesh."""
    stages = mesh.shape["pipeline"]
    stack = (repeats, stages, -(-NUM_LAYERS // (repeats * stages)))
    rng = np.random.default_rng(seed)

    def place(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def layers(*shape, spec):
        values = np.zeros((np.prod(stack), *shape), np.float32)
        values[:NUM_LAYERS] = rng.normal(size=(NUM_LAYERS, *shape))
        return place(values.reshape(*stack, *shape), None, "pipeline", None, *spec)

    params = {
        "embed": place(rng.normal(size=(16, 32)).astype(jnp.bfloat16), ("pipeline", "tensor"), "expert"),
        "layers": {"w_up": layers(16, 8, 4, spec=("expert", None, "tensor")), "scale": layers(8, spec=())},
    }
    adam = optax.ScaleByAdamState(
        count=place(np.int32(7)),
        mu=jax.tree.map(lambda x: x * jnp.asarray(0.1, x.dtype), params),
        nu=jax.tree.map(jnp.square, params),
    )
    opt_state = (adam, optax.EmptyState(), None, place(ODD_BITS.view(np.float32), ("pipeline", "tensor")))
    return State(step=place(np.int32(7)), params=params, opt_state=opt_state)


def template_of(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_bit_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (e.shape, e.dtype, e.sharding)
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


@pytest.fixture(scope="module")
def state():
    return make_state(make_mesh((4, 2, 2)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    """A directory with checkpoints of steps 1 and 2, both of the same state."""
    directory = tmp_path_factory.mktemp("saved")
    with Checkpointer(directory, keep=3, every=1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state, make_iterator(), metadata={"step": step})
    return directory


@pytest.fixture
def damageable(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "damageable")


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: messages.append(text % args))
    return messages


def test_restored_state_is_bit_identical(tmp_path, state):
    states = {1: jax.tree.map(lambda x: x + x, state), 2: state}
    with Checkpointer(tmp_path, keep=3, every=1) as checkpointer:
        for step, saved in states.items():
            checkpointer.save(step, saved, metadata=METADATA | {"step": step})
    with Checkpointer(tmp_path, keep=3, every=1) as checkpointer:
        for asked, expected in ((None, 2), (1, 1)):
            restored, step, metadata = checkpointer.restore(template_of(state), step=asked)
            assert (step, metadata) == (expected, METADATA | {"step": expected})
            assert_bit_identical(restored, states[expected])


@pytest.mark.parametrize(
    ("shape", "repeats"),
    [((16, 1, 1), 1), ((2, 4, 2), 1), ((1, 1, 1), 1), ((4, 2, 2), 2), ((1, 1, 1), 4), ((2, 4, 1), 1), ((4, 1, 2), 4)],
)
def test_restores_the_same_values_onto_another_mesh(saved, shape, repeats):
    axis_type = AxisType.Explicit if shape[1] == 4 or repeats == 4 else AxisType.Auto  # both must work
    wanted = make_state(make_mesh(shape, axis_type), repeats)
    with Checkpointer(saved, keep=3, every=1) as checkpointer:
        restored, _, _ = checkpointer.restore(template_of(wanted))
    assert_bit_identical(restored, wanted)


def test_restackable_keeps_what_divides():
    wanted = NamedSharding(make_mesh((4, 2, 2)), PartitionSpec(None, "pipeline", None, "expert"))

    def spec(*shape):
        return tuple(restackable((*shape, 8, 8), wanted).spec)

    assert spec(1, 4, 1) == (None, "pipeline", None, "expert", None)
    assert spec(1, 1, 4) == (None, None, "pipeline", "expert", None), "the stages' axis moves to the layers"
    assert spec(2, 1, 1) == ("pipeline", None, None, "expert", None), "or to the repeats"
    assert spec(1, 3, 1) == (None, None, None, "expert", None), "or the leaf is replicated over it"


def test_caller_may_donate_at_once(tmp_path, monkeypatch, state):
    """The training loop donates the state to the next step while its checkpoint is still being written."""
    gate = threading.Event()
    finalize = checkpoint.ocp.PyTreeCheckpointHandler.finalize
    monkeypatch.setattr(
        checkpoint.ocp.PyTreeCheckpointHandler, "finalize", lambda self, d: gate.wait(30) and finalize(self, d)
    )
    mine = jax.tree.map(jnp.copy, state)
    with Checkpointer(tmp_path, keep=1, every=1) as checkpointer:
        checkpointer.save(1, mine, metadata={})
        for _ in range(3):
            mine = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0)(mine)
        jax.block_until_ready(mine)
        assert list(tmp_path.glob("1")) == [], "save must return before the checkpoint is whole"
        gate.set()
        restored, _, _ = checkpointer.restore(template_of(state))
    assert_bit_identical(restored, state)


def make_iterator():
    return iter(grain.MapDataset.range(100).shuffle(seed=3).to_iter_dataset().batch(2))


def test_position_in_the_data_is_part_of_the_checkpoint(tmp_path, state):
    iterator = make_iterator()
    [next(iterator) for _ in range(3)]
    with Checkpointer(tmp_path, keep=2, every=1) as checkpointer:
        checkpointer.save(3, state, iterator, metadata={})
        expected = [next(iterator).tolist() for _ in range(5)]  # while the write goes on
        resumed = make_iterator()
        assert checkpointer.restore(template_of(state), resumed)[1] == 3
        assert [next(resumed).tolist() for _ in range(5)] == expected
        checkpointer.save(4, state, metadata={})
        with pytest.raises(CheckpointError, match="without a data iterator"):
            checkpointer.restore(template_of(state), make_iterator())


def test_no_checkpoint_is_a_fresh_start(tmp_path, state):
    with Checkpointer(tmp_path / "new", keep=1, every=10) as checkpointer:
        assert checkpointer.restore(template_of(state)) is None
        assert checkpointer.read_metadata() is None
        assert [step for step in range(1, 31) if checkpointer.due(step)] == [10, 20, 30]
        with pytest.raises(ValueError, match=r"step=5 has no checkpoint in .*; there are \[\]"):
            checkpointer.restore(template_of(state), step=5)


def test_keeps_the_newest_and_saves_a_step_once(tmp_path, state):
    with Checkpointer(tmp_path, keep=2, every=1) as checkpointer:
        for step in (1, 2, 5, 9):
            assert checkpointer.save(step, state, metadata={})
        assert not checkpointer.save(9, state, metadata={}), "the end of a run may fall on a checkpoint"
        checkpointer.wait()
        assert checkpointer.steps() == [5, 9]
        with pytest.raises(ValueError, match="step=7 must be more than 9"):
            checkpointer.save(7, state, metadata={})
    with Checkpointer(tmp_path, keep=2, every=1) as checkpointer:
        checkpointer.restore(template_of(state))
        assert not checkpointer.save(9, state, metadata={}), "a resumed run may end at once"


def test_metadata_is_read_without_the_arrays(damageable, state, warnings, monkeypatch):
    checked, find_damage = [], checkpoint.find_damage
    monkeypatch.setattr(checkpoint, "find_damage", lambda path: checked.append(path.name) or find_damage(path))
    flip(damageable / "2" / "checksums.json")
    with Checkpointer(damageable, keep=3, every=1) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_restore_state", None)
            assert checkpointer.read_metadata() == {"step": 1}, "the newest is damaged"
        assert checkpointer.restore(template_of(state))[1:] == (1, {"step": 1})
        assert checked == ["2", "1"], "a checkpoint's files are read for their checksums only once"
        assert len(warnings) == 1
        with pytest.raises(CheckpointError, match=r"no readable .*step 2: checksums.json has changed"):
            checkpointer.read_metadata(2)
        with pytest.raises(ValueError, match=r"step=3 has no checkpoint in .*; there are \[1, 2\]"):
            checkpointer.read_metadata(3)


def test_parts_named_fresh_start_anew_and_the_rest_is_restored(saved, state):
    fresh = {"count": jnp.int32(3), "new": jnp.ones((2, 5))}
    with Checkpointer(saved, keep=3, every=1) as checkpointer:
        wanted = dataclasses.replace(template_of(state), opt_state=fresh)
        with pytest.raises(ValueError, match="NamedSharding"):
            checkpointer.restore(wanted)
        restored, step, _ = checkpointer.restore(wanted, make_iterator(), fresh=("opt_state",))
    assert step == 2
    assert_bit_identical(restored, dataclasses.replace(state, opt_state=fresh))


FILES = ["checksums.json", "state/ocdbt.process_0/d/*", "state/d/*", "state/manifest.ocdbt", "state/_METADATA"]
FILES += ["state/_sharding", "state/array_metadatas/process_0", "data/process_0-of-1.json", "metadata/metadata"]


def flip(path, where=0.5):
    """Flips one bit of the file, `where` being how far into it."""
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 0x04
    path.write_bytes(data)


DAMAGE = {
    "flipped": flip,
    "flipped at the start": lambda path: flip(path, 0),
    "flipped at the end": lambda path: flip(path, 1),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}
UNREAD = ("_CHECKPOINT_METADATA", "commit_success.txt")


@pytest.mark.parametrize("damage", ["flipped", "truncated", "deleted"])
@pytest.mark.parametrize("pattern", FILES)
def test_damaged_newest_is_named_and_passed_over(damageable, state, warnings, pattern, damage):
    path = max((damageable / "2").glob(pattern), key=lambda p: p.stat().st_size)
    DAMAGE[damage](path)
    with Checkpointer(damageable, keep=3, every=1) as checkpointer:
        restored, step, metadata = checkpointer.restore(template_of(state), make_iterator())
    assert (step, metadata) == (1, {"step": 1})
    assert_bit_identical(restored, state)
    [warning] = warnings
    assert "Checkpoint of step 2" in warning
    assert pattern.strip("*") in warning


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_any_file_is_found(damageable, damage):
    directory = damageable / "2"
    assert checkpoint.find_damage(directory) is None
    files = [path for path in directory.rglob("*") if path.is_file()]
    checked = [path for path in files if path.name not in UNREAD or path.parent != directory]
    assert len(checked) > 12
    for path in checked:
        data = path.read_bytes()
        DAMAGE[damage](path)
        assert checkpoint.find_damage(directory) is not None, path
        path.write_bytes(data)


@pytest.mark.parametrize("name", UNREAD)
def test_files_without_a_checksum_are_not_read(damageable, state, name):
    for damage in DAMAGE.values():
        damage(damageable / "2" / name)
        with Checkpointer(damageable, keep=3, every=1) as checkpointer:
            restored, step, _ = checkpointer.restore(template_of(state))
        (damageable / "2" / name).write_text("rubbish")
        assert step == 2
        assert_bit_identical(restored, state)


def test_damaged_checkpoint_is_set_aside_when_its_step_is_saved_again(damageable, state, warnings):
    flip(damageable / "2" / "checksums.json")
    with Checkpointer(damageable, keep=3, every=1) as checkpointer:
        assert checkpointer.restore(template_of(state))[1] == 1
        assert (damageable / "2").exists(), "restoring alone changes nothing"
        checkpointer.save(2, state, metadata={})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2]
    assert len(list(damageable.glob("damaged-2-*"))) == 1
    with Checkpointer(damageable, keep=3, every=1) as checkpointer:
        assert checkpointer.restore(template_of(state))[1] == 2


def test_all_damaged_is_an_error_not_a_fresh_start(damageable, state, warnings):
    with Checkpointer(damageable, keep=3, every=1) as checkpointer:
        flip(max((damageable / "2" / "state" / "d").iterdir()))
        with pytest.raises(CheckpointError, match=r"no readable .*step 2: state/d/.* has changed"):
            checkpointer.restore(template_of(state), step=2)  # what was asked for is not replaced by another
        (damageable / "1" / "metadata" / "metadata").unlink()
        with pytest.raises(
            CheckpointError, match=r"no readable .*step 2: state/d/.*step 1: metadata/metadata is missing"
        ):
            checkpointer.restore(template_of(state))


def test_another_state_is_one_error_that_names_the_leaves(tmp_path):
    sharding = NamedSharding(make_mesh((4, 2, 2)), PartitionSpec())

    def tree(**shapes):
        return {"params": {k: jax.device_put(np.ones(v, np.float32), sharding) for k, v in shapes.items()}}

    with Checkpointer(tmp_path, keep=1, every=1) as checkpointer:
        checkpointer.save(1, tree(a=(2, 3), layers=(1, 2, 2, 8), c=(4,)), metadata={})  # 3 layers or 4

        def message(template):
            with pytest.raises(CheckpointError) as error:
                checkpointer.restore(template)
            return str(error.value)

        text = message(template_of(tree(a=(3, 2), layers=(1, 1, 2, 8), d=(1,))))
        assert "params.a is stored as [2, 3] but wanted as [3, 2]" in text
        assert "params.layers is stored as [1, 2, 2, 8] but wanted as [1, 1, 2, 8]" in text
        assert "params.d is wanted but not stored" in text
        assert "params.c is stored but not wanted" in text
        other = tree(a=(2, 3), layers=(1, 2, 2, 16), c=(4,))
        other["params"]["a"] = other["params"]["a"].astype(jnp.bfloat16)
        text = message(template_of(other))
        assert "params.a is stored as float32 but wanted as bfloat16" in text
        assert "params.layers is stored as [1, 2, 2, 8] but wanted as [1, 2, 2, 16]" in text
        text = message(template_of(tree(a=(2, 3), layers=(1, 1, 5, 8), c=(4,))))
        assert "params.layers is stored as [1, 2, 2, 8] but wanted as [1, 1, 5, 8]" in text
        # It could have 3 layers, as its shape says, but holds 4.
        with pytest.raises(CheckpointError, match=r"params.layers is stored as \[1, 2, 2, 8\], with more layers than"):
            checkpointer.restore(template_of(tree(a=(2, 3), layers=(1, 1, 3, 8), c=(4,))))


@pytest.mark.parametrize("call", ["save", "restore", "wait", "close"])
def test_background_error_surfaces_at_the_next_call(tmp_path, monkeypatch, state, call):
    checkpointer = Checkpointer(tmp_path, keep=3, every=1)
    checkpointer.save(1, state, metadata={})
    checkpointer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_checksums", lambda directory: 1 / 0)
        checkpointer.save(2, state, metadata={})
        arguments = {"save": [3, state], "restore": [template_of(state)]}.get(call, [])
        keywords = {"metadata": {}} if call == "save" else {}
        with pytest.raises(CheckpointError, match=rf"the checkpoint of step 2 failed: division by zero: {tmp_path}/2$"):
            getattr(checkpointer, call)(*arguments, **keywords)
    if call == "close":
        checkpointer = Checkpointer(tmp_path, keep=3, every=1)
    assert checkpointer.restore(template_of(state))[1] == 1
    assert checkpointer.save(2, state, metadata={}), "the same step can be tried again"
    assert checkpointer.restore(template_of(state))[1] == 2
    checkpointer.close()


# Each is legal in the name of a folder, and something else to a shell, a pattern, an address, a file system or Python.
NAMES = [
    *"[]*?\\%#:{}~&!$`|;<>^'\"@,+=()- ",
    "\n",
    "\t",
    "\x01",
    "ü",
    "e\u0301",
    "实验",
    "\udcff",
    "gs:",
    "s3:",
    "a**b",
]
NAMES += ["[1]", "100%20", "%2F", "~x", "$HOME", "C:", "a.zarr|zip:", "5", ".hidden", "...", "a.orbax-checkpoint-tmp"]
NAMES += ["x" * 255, "/".join(["y" * 250] * 14)]  # of 3,700 bytes in all: Orbax's own names must stay short of 4,096


@pytest.mark.full
def test_every_folders_name_saves_and_restores(tmp_path):
    sharding = NamedSharding(make_mesh((2, 1, 1)), PartitionSpec("expert"))
    for number, name in enumerate(NAMES):
        small = {"w": jax.device_put(np.arange(8, dtype=np.float32) + number, sharding)}
        directory = tmp_path / str(number) / name / "checkpoints"
        with Checkpointer(directory, keep=2, every=1) as checkpointer:
            checkpointer.save(1, small, make_iterator(), metadata={"name": number})
        assert checkpoint.find_damage(directory / "1") is None, name
        with Checkpointer(directory, keep=2, every=1) as checkpointer:
            restored, step, metadata = checkpointer.restore(template_of(small), make_iterator())
            with pytest.raises(CheckpointError, match="is stored as") as error:
                checkpointer.restore({"w": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding)})
        assert str(error.value).startswith(str(directory / "1")), "messages have the name as it was given"
        assert (step, metadata) == (1, {"name": number})
        assert_bit_identical(restored, small)
        assert [path.name for path in (tmp_path / str(number)).iterdir()] == [name.split("/")[0]], (
            "nothing else is made"
        )


def test_a_run_whose_name_is_a_pattern_is_not_mixed_up_with_others(tmp_path, state):
    other = jax.tree.map(lambda x: x + x, state)
    with (
        Checkpointer(tmp_path / "lr_12", keep=2, every=1) as one,
        Checkpointer(tmp_path / "lr_*", keep=2, every=1) as two,
    ):
        one.save(1, other, metadata={})
        two.save(1, state, metadata={})
        assert_bit_identical(two.restore(template_of(state))[0], state)
        assert_bit_identical(one.restore(template_of(state))[0], other)


@pytest.mark.parametrize(
    "spell", [lambda path: f"{path}/", lambda path: os.path.relpath(path), lambda path: f"{path}/../a"]
)
def test_a_folder_has_many_names(tmp_path, monkeypatch, state, spell):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with Checkpointer(spell(tmp_path / "a"), keep=1, every=1) as checkpointer:
        checkpointer.save(1, state, metadata={})
        monkeypatch.chdir("/")
    with Checkpointer(tmp_path / "a", keep=1, every=1) as checkpointer:
        assert checkpointer.restore(template_of(state))[1] == 1


def test_a_folder_that_cannot_be_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for name, why in (("file", "File exists"), ("file/more", "Not a directory"), ("x" * 256, "File name too long")):
        with pytest.raises(ConfigError, match=f"directory={tmp_path / name} cannot be a folder .*{why}"):
            Checkpointer(tmp_path / name, keep=1, every=1)
    (tmp_path / "[tmp]").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "[tmp]"))
    with pytest.raises(ConfigError, match=r"has a name that tensorstore cannot read, and so has TMPDIR="):
        Checkpointer(tmp_path / "[1]", keep=1, every=1)


def raise_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FULL = {
    "before": ("full_disk_error", lambda _: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "in an array": ("ocp.PyTreeCheckpointHandler.finalize", raise_full),
    "in the checksums": ("write_checksums", raise_full),
}


@pytest.mark.parametrize("where", FULL)
def test_a_full_disk_costs_one_checkpoint_and_is_told_in_one_line(tmp_path, monkeypatch, state, caplog, where):
    with Checkpointer(tmp_path, keep=2, every=1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state, metadata={})
        checkpointer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(f"moejax.train.checkpoint.{FULL[where][0]}", FULL[where][1])
            for step in (3, 4):
                checkpointer.save(step, state, metadata={})
                with pytest.raises(CheckpointError) as error:
                    checkpointer.wait()
                assert str(error.value) == (
                    f"writing the checkpoint of step {step} failed: No space left on device: {tmp_path}/{step}"
                )
                assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"], "what was begun takes no room"
        assert [record for record in caplog.records if record.exc_info] == [], "Orbax's tracebacks are dropped"
        checkpointer.save(4, state, metadata={})
        checkpointer.wait()
        assert checkpointer.steps() == [2, 4], "an older one goes when a newer one is whole, not before, and not never"
        assert_bit_identical(checkpointer.restore(template_of(state))[0], state)


def test_errors_that_are_not_orbaxs_are_still_logged(tmp_path, caplog):
    with Checkpointer(tmp_path, keep=1, every=1):
        try:
            raise_full()
        except OSError:
            logging.exception("ours")
        logging.error("no exception")
    assert caplog.messages == ["ours", "no exception"]


def test_what_tensorstore_answers_to_a_closed_loop_is_not_printed(tmp_path, caplog, monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    orbax_workarounds.drop_repeated_errors.__wrapped__()
    ours, theirs = (SimpleNamespace(exc_value=RuntimeError(text)) for text in ("ours", "Event loop is closed"))
    for error in (ours, theirs):
        sys.unraisablehook(error)
    assert printed == [ours]

    async def leave_an_error(text):
        asyncio.get_running_loop().create_future().set_exception(ValueError(text))
        gc.collect()

    for text in ("ours", f'Error writing "{tmp_path}/5.orbax-checkpoint-tmp/state": No space left on device'):
        asyncio.run(leave_an_error(text))
    assert [str(record.exc_info[1]) for record in caplog.records] == ["ours"]


def test_reasons_are_short():
    long = "RESOURCE_EXHAUSTED: Error opening: Failed to write [tensorstore_spec='{...}'] [os_error_code='28']"
    assert reason(ValueError(long)) == "No space left on device"
    assert reason(ValueError("DATA_LOSS: bad [tensorstore_spec='{...}']")) == "DATA_LOSS: bad"
    assert reason(OSError(errno.EDQUOT, "Disk quota exceeded", "x")) == "Disk quota exceeded"
    assert reason(KeyError()) == "KeyError()"


KILLED = """
    import jax, pathlib, sys, time
    jax.config.update("jax_num_cpu_devices", 16)
    from moejax.train import checkpoint
    from test_checkpoint import make_iterator, make_mesh, make_state

    directory, hook = pathlib.Path(sys.argv[1]), sys.argv[2]
    state = make_state(make_mesh((4, 2, 2)))
    checkpointer = checkpoint.Checkpointer(directory / "checkpoints", keep=1, every=1)
    checkpointer.save(1, state, make_iterator(), metadata={})
    checkpointer.wait()

    def block(*args):
        (directory / "blocked").touch()
        time.sleep(600)

    if hook == "arrays":
        checkpoint.ocp.PyTreeCheckpointHandler.finalize = block  # Orbax has written some of its files
    checkpoint.write_checksums = block  # everything is written, but not renamed
    checkpointer.save(2, state, make_iterator(), metadata={})
    checkpointer.wait()
"""


@pytest.mark.full
@pytest.mark.parametrize("hook", ["arrays", "checksums"])
def test_killed_while_writing_leaves_the_one_before(tmp_path, state, hook):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), hook],
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])},
    )
    while not (tmp_path / "blocked").exists() and process.poll() is None:
        time.sleep(0.02)
    assert (tmp_path / "blocked").exists(), f"the process ended early: {process.poll()}"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    directory = tmp_path / "checkpoints"
    assert len(list(directory.glob("2*"))) == 1, "it was killed in the middle of writing step 2"
    with Checkpointer(directory, keep=1, every=1) as checkpointer:
        restored, step, _ = checkpointer.restore(template_of(state), make_iterator())
        assert step == 1
        assert_bit_identical(restored, state)
        checkpointer.save(2, state, metadata={})
        assert checkpointer.restore(template_of(state))[1] == 2
        checkpointer.wait()
    assert sorted(path.name for path in directory.iterdir()) == ["2"], "what the kill left behind is gone"


def test_arguments_are_checked(tmp_path, state):
    for name in ("keep", "every"):
        with pytest.raises(ValueError, match=f"{name}=0 must be 1 or more"):
            Checkpointer(tmp_path, **{"keep": 1, "every": 1, name: 0})
    checkpointer = Checkpointer(tmp_path, keep=1, every=1)
    with pytest.raises(ValueError, match="different paths"):
        checkpointer.save(1, {"a.b": state.step, "a": {"b": state.step}}, metadata={})
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpointer.save(1, state, metadata={"a": object()})
    assert checkpointer.save(1, state, metadata={}), "a save that was refused left nothing behind"
    with pytest.raises(ValueError, match=r"template_state's step=.* must have a NamedSharding"):
        checkpointer.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))
    checkpointer.close()
    checkpointer.close()
    with pytest.raises(CheckpointError, match="closed"):
        checkpointer.save(1, state, metadata={})
