"""Rows sorted by expert times each expert's own matrix: one name, three passes, a backend for each platform.

A backend is a module with the three passes as functions; `[D, F]` of an expert's matrix are contracted as

    forward(x_ND, w_eDF, group_sizes_e) -> y_NF      y = x w
    dlhs(dy_NF, w_eDF, group_sizes_e) -> dx_ND       dx = dy w^T
    drhs(x_ND, dy_NF, group_sizes_e) -> dw_eDF       dw = x^T dy, over the expert's rows
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from moejax.kernels import manual
from moejax.kernels.platform import implementation_for

Implementation = Literal["reference", "cpu", "gpu", "tpu"]
Pass = Literal["forward", "dlhs", "drhs"]
Implementations = tuple[Implementation, Implementation, Implementation]  # of forward, dlhs and drhs

_PASSES: tuple[Pass, ...] = get_args(Pass)
# One a pass, for no library is the fastest at all three everywhere: when one is, for a pass, it goes in here.
_BY_PLATFORM: dict[str, Implementations] = {
    "cpu": ("cpu", "cpu", "cpu"),
    "cuda": ("gpu", "gpu", "gpu"),
    "gpu": ("gpu", "gpu", "gpu"),
    "tpu": ("tpu", "tpu", "tpu"),
}


def grouped_matmul_implementation(platform: str | None = None, pass_: Pass = "forward") -> Implementation:
    """The implementation that `grouped_matmul` uses on `platform` for the pass "forward", "dlhs" or "drhs".

    The platform is "cpu", "cuda" (or "gpu") or "tpu"; None means the one that the surrounding program is for, see
    `moejax.kernels.platform`.
    """
    if pass_ not in _PASSES:
        raise ValueError(f"pass_={pass_!r} must be one of {', '.join(map(repr, _PASSES))}")
    of_pass = {name: passes[_PASSES.index(pass_)] for name, passes in _BY_PLATFORM.items()}
    return implementation_for("grouped matmul", of_pass, platform)


def grouped_matmul(
    x_ND: jax.Array, w_eDF: jax.Array, group_sizes_e: jax.Array, *, implementation: Implementation | None = None
) -> jax.Array:
    """Returns `y[n] = x[n] @ w[group of n]`: the first `group_sizes_e[0]` rows are of group 0, and so on.

    Rows past the last group's give zeros and get zero gradients. Works on the per-device arrays inside `jax.shard_map`
    (with `check_vma=True`, its default) as well as outside, and can be differentiated with respect to x and w. Autodiff
    sums the gradient of a `w` that varies over fewer axes than x: inside a `cond` that not every device takes, have it
    vary (`manual.vary`) outside.

    Args:
      x_ND: rows [N, D]; float32, bfloat16 or float16.
      w_eDF: one matrix a group, [e, D, F], x's dtype.
      group_sizes_e: rows of each group, int32 [e], not negative; they may add up to less than N, but not to more.
      implementation: of all three passes, "reference", "cpu", "gpu" or "tpu"; None for what
        `grouped_matmul_implementation` says of each.

    Returns:
      [N, F] in x's dtype; sums are float32.

    Raises:
      ValueError: an argument has the wrong shape or dtype, or `implementation` is unknown.
    """
    _check(x_ND, w_eDF, group_sizes_e)
    names = (implementation,) * 3 if implementation else tuple(grouped_matmul_implementation(None, p) for p in _PASSES)
    for name in names:
        if name not in get_args(Implementation):
            choices = ", ".join(map(repr, get_args(Implementation)))
            raise ValueError(f"implementation={name!r} must be one of {choices}")
    return _grouped_matmul(names, *manual.vary_alike(x_ND, w_eDF, group_sizes_e))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(names: Implementations, x_ND: jax.Array, w_eDF: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
    return _backend(names[0]).forward(x_ND, w_eDF, group_sizes_e)


def _forward(
    names: Implementations, x_ND: jax.Array, w_eDF: jax.Array, group_sizes_e: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _grouped_matmul(names, x_ND, w_eDF, group_sizes_e), (x_ND, w_eDF, group_sizes_e)


def _backward(
    names: Implementations, saved: tuple[jax.Array, ...], dy_NF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_ND, w_eDF, group_sizes_e = saved
    dx_ND = _backend(names[1]).dlhs(dy_NF, w_eDF, group_sizes_e)
    dw_eDF = _backend(names[2]).drhs(x_ND, dy_NF, group_sizes_e)
    return dx_ND, dw_eDF, None


_grouped_matmul.defvjp(_forward, _backward)


def _backend(name: Implementation) -> ModuleType:
    # Imported when used: the kernel libraries cost a second to import and bring nothing to a CPU run.
    return importlib.import_module(f"moejax.kernels.grouped_matmul.{name}")


def _check(x_ND: jax.Array, w_eDF: jax.Array, group_sizes_e: jax.Array) -> None:
    if x_ND.ndim != 2:
        raise ValueError(f"x_ND has shape {x_ND.shape}; must be [rows, D]")
    if w_eDF.ndim != 3 or w_eDF.shape[1] != x_ND.shape[1]:
        raise ValueError(f"w_eDF has shape {w_eDF.shape}; must be (groups, {x_ND.shape[1]}, F) for x's {x_ND.shape}")
    if group_sizes_e.shape != w_eDF.shape[:1]:
        shape = group_sizes_e.shape
        raise ValueError(f"group_sizes_e has shape {shape}; must be ({w_eDF.shape[0]},), one size a matrix of w_eDF")
    if group_sizes_e.dtype != jnp.int32:
        raise ValueError(f"group_sizes_e has dtype {group_sizes_e.dtype}; must be int32")
    if not jnp.issubdtype(x_ND.dtype, jnp.floating) or w_eDF.dtype != x_ND.dtype:
        raise ValueError(f"x and w have dtypes {x_ND.dtype} and {w_eDF.dtype}; must be one floating-point dtype")
