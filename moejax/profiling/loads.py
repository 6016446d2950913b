"""How evenly a run's experts were loaded, from what it recorded: figures by layer, and a picture.

Dimensions: N recorded steps, C columns of the picture (a few steps each), L mixture-of-experts layers, E experts.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from moejax.balance import load_cv_floor
from moejax.checks import check
from moejax.config import BalanceConfig, ModelConfig
from moejax.overrides import from_record
from moejax.plots import pyplot
from moejax.train.metrics import LOADS_FILE, METRICS_FILE, read_loads, read_metrics
from moejax.train.record import RECORD_FILE, read_starts

MAX_COLUMNS = 200  # of the picture over steps: about two pixels each
COLOR_LIMITS = (1.25, 1.5, 2.0, 4.0)  # load over the mean, and its inverse below
LEAST = 1e-9  # stands for no load where a logarithm is taken
MAX_NUMBERED = 20  # experts whose loads are written into the picture


def _read_config(workdir: Path) -> dict[str, Any]:
    """Returns the model and the balance of the run's last start, as `dataclasses.asdict` gives them."""
    file = workdir / RECORD_FILE
    config = read_starts(workdir)[-1].get("config")
    config = config if isinstance(config, dict) else {}
    for part in ("model", "balance"):
        check(part in config, f"{file} has no config.{part}; give the --workdir of a whole run")
    model, _ = from_record(ModelConfig, config["model"], f"{file}: config.model")
    balance, _ = from_record(BalanceConfig, config["balance"], f"{file}: config.balance")
    return {"model": dataclasses.asdict(model), "balance": dataclasses.asdict(balance)}


@dataclasses.dataclass(frozen=True)
class LoadHistory:
    """A run's loads, its metrics, and the configuration of its last start, in which bounds and window are."""

    name: str
    steps_N: np.ndarray  # int, ascending
    load_NLE: np.ndarray  # int, assignments
    metrics: list[dict[str, Any]]  # a dict a step, as `read_metrics` gives them
    config: dict[str, Any]

    @classmethod
    def read(cls, workdir: str | Path) -> LoadHistory:
        """That of a run's directory; the run may be going on.

        Raises:
            ConfigError: the directory holds no run, or one that has not ended a step.
        """
        workdir = Path(workdir)
        for name in (RECORD_FILE, METRICS_FILE, LOADS_FILE):
            check((workdir / name).exists(), f"{workdir} holds no {name}; give the --workdir of a run")
        steps_N, load_NLE = read_loads(workdir)
        metrics = read_metrics(workdir)
        check(len(steps_N) > 0 and len(metrics) > 0, f"the run in {workdir} has not ended a step yet")
        return cls(workdir.resolve().name, steps_N, load_NLE, metrics, _read_config(workdir))

    @property
    def window_steps(self) -> int:
        """That the last window holds."""
        return min(self.config["balance"]["window"], len(self.steps_N))

    @property
    def window_load_LE(self) -> np.ndarray:
        """Assignments over the last window."""
        return self.load_NLE[-self.window_steps :].sum(0)

    @property
    def window_tokens(self) -> float:
        return float(self.window_load_LE.sum(-1).mean() / self.config["model"]["experts_per_token"])

    @property
    def window_cv_floor(self) -> float:
        """The CV that sampling alone gives a uniformly random router over the window's tokens."""
        model = self.config["model"]
        return load_cv_floor(self.window_tokens, model["experts_per_token"], model["num_experts"])

    def columns(self, most: int = MAX_COLUMNS) -> tuple[np.ndarray, np.ndarray]:
        """The load over the mean [C, L, E] of at most so many groups of steps, and where they begin and end [C + 1].

        All groups are of as many steps, but for the last, which may be of fewer.
        """
        size = math.ceil(len(self.steps_N) / most)
        starts = np.arange(0, len(self.steps_N), size)
        share_CLE = over_mean(np.add.reduceat(self.load_NLE, starts, axis=0))
        return share_CLE, np.append(self.steps_N[starts], self.steps_N[-1] + 1) - 0.5

    def by_layer(self) -> list[dict[str, float]]:
        """The figures of the last window, a dict a layer."""
        return [
            {
                "layer": layer,
                "load_cv": float(share_E.std()),
                "max_over_mean": float(share_E.max()),
                "busiest_expert": int(share_E.argmax()),
                "min_over_mean": float(share_E.min()),
                "idle_experts": int((share_E == 0).sum()),
            }
            for layer, share_E in enumerate(over_mean(self.window_load_LE))
        ]


def over_mean(load: np.ndarray) -> np.ndarray:
    """Loads [..., E] over their mean, float64."""
    return load / load.mean(-1, keepdims=True)


def figure(history: LoadHistory) -> Any:
    """A picture: loads by layer and expert over the last window and over all steps, CV and rounds with their bounds.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    plt = pyplot()
    share_LE = over_mean(history.window_load_LE)
    share_CLE, edges = history.columns()
    top = min(max(3.2, 1.2 + 0.34 * len(share_LE)), 8.0)  # inches
    fig = plt.figure(figsize=(14, top + 3.8), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    fig.suptitle(f"Expert load of {history.name}, steps {history.steps_N[0]:,} to {history.steps_N[-1]:,}")
    (left, right), (cv, rounds) = fig.subplots(2, 2, height_ratios=(top, 3.2))
    _draw_window(left, history, share_LE)
    _draw_steps(right, share_CLE, edges)
    _draw_cv(cv, history)
    _draw_rounds(rounds, history)
    return fig


def _colors(share: np.ndarray, within: float) -> dict[str, Any]:
    """Colors as far as the part `within` of the loads is from the mean, above it or below; white is the mean."""
    furthest = np.quantile(np.maximum(share, 1 / np.maximum(share, LEAST)), within)
    limit = next((limit for limit in COLOR_LIMITS if furthest <= limit), COLOR_LIMITS[-1])
    return {"norm": pyplot().matplotlib.colors.LogNorm(1 / limit, limit), "cmap": "RdBu_r"}


def _draw_colorbar(ax: Any, image: Any) -> None:
    bar = ax.figure.colorbar(image, ax=ax, label="load over the layer's mean", extend="both", pad=0.02)
    limit = image.norm.vmax
    ticks = [1 / limit, limit**-0.5, 1, limit**0.5, limit]
    bar.set_ticks(ticks, labels=[f"{tick:.2f}" for tick in ticks])
    bar.minorticks_off()


def _draw_window(ax: Any, history: LoadHistory, share_LE: np.ndarray) -> None:
    """A cell an expert; the loads stand in it where there is room."""
    layers, experts = share_LE.shape
    image = ax.imshow(
        np.maximum(share_LE, LEAST), aspect="auto", interpolation="none", **_colors(share_LE, within=0.99)
    )
    _draw_colorbar(ax, image)
    ax.set(xlabel="expert", ylabel="layer")
    ax.set_title(f"last {history.window_steps} steps, {history.window_tokens:,.0f} tokens")
    _count_from_0(ax.xaxis, experts)
    _count_from_0(ax.yaxis, layers)
    if experts > MAX_NUMBERED or layers > MAX_NUMBERED:
        return
    for (layer, expert), share in np.ndenumerate(share_LE):
        far = abs(math.log(max(share, LEAST))) > 0.6 * math.log(image.norm.vmax)
        ax.text(
            expert, layer, f"{share:.2f}" if share < 10 else f"{share:.0f}",
            ha="center", va="center", fontsize=7, color="white" if far else "black",
        )  # fmt: skip


def _draw_steps(ax: Any, share_CLE: np.ndarray, edges: np.ndarray) -> None:
    """A row an expert, from 0 at the top of its layer; a line between layers."""
    columns, layers, experts = share_CLE.shape
    rows = np.maximum(share_CLE, LEAST).reshape(columns, layers * experts).T
    image = ax.pcolormesh(
        edges, np.arange(layers * experts + 1) / experts - 0.5, rows, rasterized=True, **_colors(share_CLE, within=0.9)
    )
    ax.invert_yaxis()
    for layer in range(1, layers):
        ax.axhline(layer - 0.5, color="black", linewidth=0.6)
    _count_from_0(ax.yaxis, layers)
    _step_axis(ax, edges[0] + 0.5, edges[-1] - 0.5)
    size = math.ceil(edges[1] - edges[0])
    each = "a column a step" if size == 1 else f"a column {size:,} steps"
    ax.set(ylabel="layer", title=f"by step: a row an expert, {each}")
    _draw_colorbar(ax, image)


def _draw_cv(ax: Any, history: LoadHistory) -> None:
    _draw_series(ax, history, {"window_load_cv_worst": "worst layer", "window_load_cv": "mean over layers"})
    floors = [line["window_load_cv_floor"] for line in history.metrics]
    ax.plot(_steps(history), floors, color="gray", linestyle=":", label="sampling floor: a random router")
    _draw_bound(ax, history, "max_load_cv")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(pyplot().matplotlib.ticker.LogLocator(subs=(1, 2, 5)))  # a decade may hold it all
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ax.set(ylabel="load CV", title=f"coefficient of variation over experts, {_window(history)}")
    _finish(ax, history)


def _draw_rounds(ax: Any, history: LoadHistory) -> None:
    values = [line["rounds"] for line in history.metrics]
    ax.plot(_steps(history), values, color="tab:blue", alpha=0.35, linewidth=1, label="mean over layers, each step")
    _draw_series(ax, history, {"window_rounds_worst": "worst layer", "window_rounds": "mean over layers"})
    _draw_bound(ax, history, "max_rounds")
    ax.set_ylim(bottom=0.9)  # a dispatch has one at least
    ax.set(ylabel="rounds per dispatch", title=f"rounds per dispatch, {_window(history)}")
    _finish(ax, history)


def _draw_series(ax: Any, history: LoadHistory, labels: dict[str, str]) -> None:
    """Two figures of each step; the first is the wider line, for the second may lie on it."""
    for (name, label), color, width in zip(labels.items(), ("tab:orange", "tab:blue"), (2.5, 1.5), strict=True):
        values = [line[name] for line in history.metrics]
        ax.plot(_steps(history), values, color=color, linewidth=width, label=label)


def _draw_bound(ax: Any, history: LoadHistory, name: str) -> None:
    bound = history.config["balance"][name]
    ax.axhline(bound, color="tab:red", linestyle="--", linewidth=1, label=f"bound, balance.{name}={bound:g}")


def _finish(ax: Any, history: LoadHistory) -> None:
    _step_axis(ax, _steps(history)[0], _steps(history)[-1])
    ax.grid(alpha=0.3)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize="small", frameon=False)


def _steps(history: LoadHistory) -> list[int]:
    return [line["step"] for line in history.metrics]


def _window(history: LoadHistory) -> str:
    return f"over the last {history.config['balance']['window']} steps"


def _count_from_0(axis: Any, number: int) -> None:
    """Ticks 0, 1, 2, ..., or every so many: at most 16 where there are many."""
    axis.set_ticks(range(0, number, 1 if number <= MAX_NUMBERED else math.ceil(number / 16)))


def _step_axis(ax: Any, first: float, last: float) -> None:
    """The same for every part of the picture."""
    ax.set_xlim(first - 0.5, last + 0.5)
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(pyplot().matplotlib.ticker.MaxNLocator(8, integer=True))
    ax.xaxis.set_major_formatter("{x:,.0f}")
