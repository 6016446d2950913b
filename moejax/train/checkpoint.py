"""Checkpoints that are written in the background, checked when read, and restored onto a different mesh.

A checkpoint of step n is the directory `<directory>/<n>/`, which appears by one rename when it is whole:

    state/           the arrays by name ("params.layers.w_up"), written by Orbax, every process its own shards
    data/            the position of the input iterator, one file per process, written by grain
    metadata/        JSON: the layout, the configuration, versions
    checksums.json   size and CRC-32 of each of the files above

Orbax checks its index when it reads, but not array values: of 24 single bits flipped in the files that hold values, 22
came back as wrong numbers without an error. `checksums.json` makes that visible. It is written last before the rename,
and checked in full (about 1 GB/s) before anything is restored.

Layer parameters are stacked as [repeats, stages, layers_per_chunk, ...]; the layer of [r, s, i] is
(r * stages + s) * layers_per_chunk + i, so any two stackings of the same layers are reshapes of each other, with more
or fewer empty places at the end.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from grain import checkpoint as grain_checkpoint
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from moejax import strict_json
from moejax.checks import make_folder
from moejax.sharding import NUM_STACK_DIMS, by_name
from moejax.train.checksums import abridged, find_damage, write_checksums
from moejax.train.orbax_workarounds import drop_repeated_errors, full_disk_error, readable_path, reason
from moejax.train.reshard import fits, restack, restackable

STATE, DATA, METADATA = "state", "data", "metadata"

PyTree = Any


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or restored; the message says which, why and what to do."""


def list_steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps that have a whole checkpoint in `directory` (not checked for damage), oldest first."""
    return sorted(int(name) for name in os.listdir(directory) if re.fullmatch("[0-9]+", name))


class Checkpointer:
    """Saves and restores the state of a training run; use it as a context manager, or call `close`.

        with Checkpointer("checkpoints", keep=2, every=100) as checkpointer:
            restored = checkpointer.restore(train_step.state_shapes, batches)
            state, step, _ = restored or (train_step.init(jax.random.key(0)), 0, {})
            for step in range(step + 1, 1001):
                state, metrics = train_step(state, train_step.put_batch(next(batches)))
                if checkpointer.due(step):
                    checkpointer.save(step, state, batches, metadata={})

    In a run of several processes, every process makes one on the same shared directory and makes the same calls.

    Args:
      directory: where the checkpoints are, under any name; made if it is not there. What a killed save left behind is
        removed.
      keep: how many of the newest checkpoints stay. An older one is removed only after a newer one is whole.
      every: steps between checkpoints; see `due`.

    Raises:
      ConfigError: the directory cannot be made, or has a name that cannot be used.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int, every: int) -> None:
        for name, value in (("keep", keep), ("every", every)):
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        self.directory = make_folder("directory", pathlib.Path(directory).absolute())
        self.every = every
        self._current: int | None = None  # the step last saved or restored
        self._saving: int | None = None  # the step last begun
        self._full_disk: OSError | None = None  # met by the save last begun; the next call raises it
        self._problems: dict[int, str | None] = {}  # by step, of those checked: how it is damaged, None if it isn't
        self._open_for_orbax = contextlib.ExitStack()
        self._path = self._open_for_orbax.enter_context(readable_path(self.directory))
        drop_repeated_errors()
        self._manager: ocp.CheckpointManager | None = ocp.CheckpointManager(
            self._path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # else a damaged step would already fail here
                async_options=ocp.AsyncOptions(post_finalization_callback=self._before_commit),
            ),
        )

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` (counted from 1): every `every` steps."""
        return step % self.every == 0

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint (not checked for damage), oldest first."""
        return list_steps(self.directory)

    def save(self, step: int, state: PyTree, data_iterator: Any = None, *, metadata: Mapping[str, Any]) -> bool:
        """Writes a checkpoint of `step`; returns once the values are copied, and writes files in the background.

        The caller may donate or delete `state` and advance `data_iterator` right away.

        Args:
          step: must be newer than every checkpoint in the directory. The step last saved or restored is left as it is.
          state: a pytree of `jax.Array`s of numbers.
          data_iterator: a grain iterator, whose position becomes part of the checkpoint.
          metadata: what JSON can hold; handed back by `restore`.

        Returns:
          Whether a checkpoint is being written; False if it is there already.

        Raises:
          CheckpointError: if the save before this one failed in the background. Call again to try this one.
          ValueError: if the step is not new.
          TypeError: if JSON cannot hold the metadata.
        """
        self.wait()
        strict_json.dumps(metadata)  # here, and not in the background
        if step == self._current:
            return False
        self._set_damaged_aside()
        newest = max(self.steps(), default=-1)
        if step <= newest:
            raise ValueError(
                f"step={step} must be more than {newest}, the newest checkpoint in {self.directory}; "
                "restore that one first, or use another directory"
            )
        items = {STATE: ocp.args.PyTreeSave(_by_name(state)), METADATA: ocp.args.JsonSave(dict(metadata))}
        if data_iterator is not None:
            items[DATA] = grain_checkpoint.CheckpointSave(data_iterator)
        self._saving = self._current = step
        # Process 0 looks for all, or they could do different things.
        error = full_disk_error(self.directory) if jax.process_index() == 0 else None
        if multihost_utils.broadcast_one_to_all(np.int32(error is not None)):
            self._full_disk = error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            self._open().save(step, args=ocp.args.Composite(**items), force=True)
        return True

    def read_metadata(self, step: int | None = None) -> dict[str, Any] | None:
        """Returns the metadata of the checkpoint that `restore(..., step=step)` would restore, without its arrays.

        Returns None if the directory has no checkpoint at all. Each checkpoint is checked for damage once: a `restore`
        that follows doesn't read the files' checksums again.

        Raises:
          CheckpointError: if every checkpoint (or the one asked for) is damaged.
          ValueError: if there is none of `step`.
        """
        chosen = self._choose(step)
        return None if chosen is None else self._metadata_of(chosen)

    def restore(
        self,
        template_state: PyTree,
        data_iterator: Any = None,
        step: int | None = None,
        *,
        fresh: Sequence[str] = (),
    ) -> tuple[PyTree, int, dict[str, Any]] | None:
        """Restores the newest checkpoint that is undamaged, or that of `step`.

        Args:
          template_state: the state wanted: `jax.ShapeDtypeStruct`s with a `NamedSharding` on the current mesh, which
            need not be the one saved on. A leaf's leading three dims may be stacked differently.
          data_iterator: a grain iterator, moved to the stored position.
          step: which checkpoint; by default the newest, or if that is damaged (a warning says how) the one before.
          fresh: top-level parts of the state, such as "balance", that start anew. The template holds their values,
            which are returned as they are; the checkpoint may hold these parts in any shape.

        Returns:
          The state, its step and its metadata; None if the directory has no checkpoint at all.

        Raises:
          CheckpointError: if every checkpoint (or the one asked for) is damaged, or holds another state than wanted.
          ValueError: if there is none of `step`.
        """
        step = self._choose(step)
        if step is None:
            return None
        path = self._path / str(step)
        state = _restore_state(path / STATE, template_state, fresh, shown=self._directory_of(step))
        if data_iterator is not None:
            if not (path / DATA).exists():
                raise CheckpointError(
                    f"{self._directory_of(step)} was saved without a data iterator; restore it without one"
                )
            grain_checkpoint.CheckpointHandler().restore(path / DATA, data_iterator)
        self._current = step
        return state, step, self._metadata_of(step)

    def wait(self) -> None:
        """Waits until the save in the background, if any, is done.

        Raises:
          CheckpointError: if it failed. What was written of it is removed, and the checkpoints before are there.
        """
        manager = self._open()
        self._raise_failure(manager.wait_until_finished, manager.check_for_errors)

    def close(self) -> None:
        """Waits and frees the threads; harmless when called again.

        Raises:
          CheckpointError: if the last save failed.
        """
        if self._manager is None:
            return
        manager, resources = self._manager, self._open_for_orbax
        try:
            self._raise_failure(manager.wait_until_finished, manager.check_for_errors, manager.close)
        finally:
            self._manager = None
            resources.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _directory_of(self, step: int | None) -> pathlib.Path:
        return self.directory / str(step)

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            raise CheckpointError(f"the Checkpointer of {self.directory} is closed; make a new one")
        return self._manager

    def _raise_failure(self, *finish: Callable[[], None]) -> None:
        """Calls each, for Orbax raises one error in several of them; raises the first, when what failed is cleared."""
        errors: list[Exception] = [self._full_disk] if self._full_disk else []
        self._full_disk = None
        for call in finish:
            try:
                call()
            except Exception as error:
                errors.append(error)
        if not errors:
            return
        path = self._directory_of(self._saving)
        if not path.exists():  # else it is whole, and removing an older one failed
            self._current = None
        if jax.process_index() == 0:
            for unfinished in self.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                # Orbax's other threads may still write there; what they leave, the next start removes.
                shutil.rmtree(unfinished, ignore_errors=True)
        self._open().reload()  # it has counted out what it was about to remove
        raise CheckpointError(
            f"writing the checkpoint of step {self._saving} failed: {reason(errors[0])}: {path}"
        ) from errors[0]

    def _before_commit(self) -> None:
        """Runs in the background, on process 0, when every file of every process is written but before the rename."""
        [unfinished] = self.directory.glob(f"{self._saving}{ocp.utils.TMP_DIR_SUFFIX}*")
        write_checksums(unfinished)

    def _metadata_of(self, step: int) -> dict[str, Any]:
        return json.loads((self._directory_of(step) / METADATA / "metadata").read_text())

    def _choose(self, step: int | None) -> int | None:
        """Returns `step` or the newest that is undamaged; None if there is no checkpoint. Warns of each passed over."""
        self.wait()
        steps = self.steps()
        if step is not None and step not in steps:
            raise ValueError(f"step={step} has no checkpoint in {self.directory}; there are {steps}")
        problems = []
        for candidate in reversed(steps if step is None else [step]):
            problem = self._problem_of(candidate)
            if problem is None:
                return candidate
            problems.append(f"step {candidate}: {problem}")
        if not problems:
            return None
        raise CheckpointError(
            f"no readable checkpoint in {self.directory} ({'; '.join(problems)}); restore the files from a copy, "
            "or use another directory to start anew"
        )

    def _problem_of(self, step: int) -> str | None:
        """Returns how the checkpoint is damaged, None if it isn't; reads the files, and warns, only once."""
        if step not in self._problems:
            # One process reads and judges, or they could choose different steps.
            problem = find_damage(self._directory_of(step)) if jax.process_index() == 0 else None
            damaged = bool(multihost_utils.broadcast_one_to_all(np.int32(problem is not None)))
            self._problems[step] = problem = (problem or "process 0 says how") if damaged else None
            if damaged:
                logging.warning(
                    "Checkpoint of step %d in %s is damaged and not used: %s", step, self.directory, problem
                )
        return self._problems[step]

    def _set_damaged_aside(self) -> None:
        """Renames what `restore` found damaged, so that the run can save the same step again and nothing is lost."""
        damaged = [step for step, problem in self._problems.items() if problem is not None]
        self._problems.clear()
        if not damaged:
            return
        if jax.process_index() == 0:
            for step in damaged:
                self._directory_of(step).rename(self.directory / f"damaged-{step}-{time.time_ns()}")
        multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._open().reload()


def _by_name(tree: PyTree) -> dict[str, Any]:
    """The leaves by their dotted path. A flat dict is stored as it is, whatever classes the tree is made of."""
    named = by_name(tree)
    if len(named) < len(jax.tree.leaves(tree)) or "" in named:
        raise ValueError("state must be a container whose leaves have different paths when joined with '.'")
    return named


def _restore_state(directory: pathlib.Path, template: PyTree, fresh: Sequence[str], shown: pathlib.Path) -> PyTree:
    def restored_not_fresh(named: Mapping[str, Any]) -> dict[str, Any]:
        return {name: leaf for name, leaf in named.items() if name.split(".")[0] not in fresh}

    every_leaf = _by_name(template)
    wanted = restored_not_fresh(every_leaf)
    for name, leaf in wanted.items():
        if not isinstance(getattr(leaf, "sharding", None), NamedSharding):
            raise ValueError(f"template_state's {name}={leaf} must have a NamedSharding on the current mesh")
    stored = restored_not_fresh(ocp.PyTreeCheckpointHandler().metadata(directory).tree)
    _check_same_leaves(shown, stored, wanted)
    restacked = [name for name in wanted if tuple(stored[name].shape) != wanted[name].shape]
    restored = _read(directory, {name: leaf.sharding for name, leaf in wanted.items() if name not in set(restacked)})
    # One at a time: a leaf may be less sharded as it is stored than as it is wanted.
    for name in restacked:
        sharding = restackable(tuple(stored[name].shape), wanted[name].sharding)
        leaf = _read(directory, {name: sharding})[name]
        if not fits(leaf, wanted[name].shape):
            raise CheckpointError(
                f"{shown} holds another state than wanted: {name} is stored as {list(leaf.shape)}, with more layers "
                f"than {list(wanted[name].shape)} has room for; use the model configuration that it was saved with"
            )
        restored[name] = jax.block_until_ready(restack(leaf, wanted[name].shape, wanted[name].sharding))
        leaf.delete()
    return jax.tree.unflatten(jax.tree.structure(template), [(every_leaf | restored)[name] for name in every_leaf])


def _check_same_leaves(directory: pathlib.Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` unless exactly the leaves wanted are stored, of the same dtypes and layers."""
    problems = [f"{name} is wanted but not stored" for name in wanted if name not in stored]
    problems += [f"{name} is stored but not wanted" for name in stored if name not in wanted]
    for name in (name for name in wanted if name in stored):
        have, want = tuple(stored[name].shape), tuple(wanted[name].shape)
        if have != want and not ("layers" in name.split(".") and _same_layers(have, want)):
            problems.append(f"{name} is stored as {list(have)} but wanted as {list(want)}")
        elif stored[name].dtype != wanted[name].dtype:
            problems.append(f"{name} is stored as {stored[name].dtype} but wanted as {wanted[name].dtype}")
    if problems:
        raise CheckpointError(
            f"{directory} holds another state than wanted: {abridged(problems)}; "
            "use the model and optimizer configuration that it was saved with"
        )


def _same_layers(have: tuple[int, ...], want: tuple[int, ...]) -> bool:
    """Returns whether both shapes can be stackings of the same number of layers."""
    if not len(have) == len(want) >= NUM_STACK_DIMS or have[NUM_STACK_DIMS:] != want[NUM_STACK_DIMS:]:
        return False
    (fewest, most), (fewest_wanted, most_wanted) = map(_numbers_of_layers, (have, want))
    return fewest <= most_wanted and fewest_wanted <= most


def _numbers_of_layers(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the least and the greatest number of layers that are stacked in this shape."""
    repeats, stages, layers_per_chunk = shape[:NUM_STACK_DIMS]
    return repeats * stages * (layers_per_chunk - 1) + 1, repeats * stages * layers_per_chunk


def _read(directory: pathlib.Path, shardings: Mapping[str, NamedSharding]) -> dict[str, jax.Array]:
    """Reads the named leaves in their stored shape and dtype."""
    if not shardings:
        return {}
    restore_args = {name: ocp.ArrayRestoreArgs(sharding=sharding) for name, sharding in shardings.items()}
    args = ocp.args.PyTreeRestore(item=dict(shardings), restore_args=restore_args, partial_restore=True)
    return ocp.PyTreeCheckpointHandler().restore(directory, args=args)
