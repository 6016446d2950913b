"""Plans a model on a cluster: the best layout for each length, what it takes of memory and time, and why.

    python experiments/plan.py --model=moe_16x10b --cluster=a100_64gb_2x8 --seq_len=128,1024,4096,10240
    python experiments/plan.py --cluster=h100_2x8 --mode=decode --seq_len=4096 --batch_size=256
    python experiments/plan.py --cluster=h100_2x8 --seq_len=1024 --out=plan.py
    python experiments/train.py --plan=plan.py

Nothing is run or compiled: the figures are closed forms, which experiments/audit.py holds against the compiler. Several
lengths are planned one by one; --out writes them as one run of mixed lengths. In a pipe, ends with one line of JSON.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from absl import flags

from experiments.shared import loading
from moejax import strict_json
from moejax.checks import ConfigError, check
from moejax.config import MAX_CAPACITY_FACTOR, DispatchConfig
from moejax.planner import report
from moejax.planner.hardware import load_calibration
from moejax.planner.search import Choice, Request, default_batch_size, find_plan
from moejax.plots import SUFFIXES
from moejax.train.plan_file import write_plan_file

FLAGS = loading.Flags(__doc__)
_MODEL = flags.DEFINE_string(
    "model",
    "moe_16x10b",
    "A preset, a name in experiments/configs, a Python file, or the folder of a Hugging Face "
    "checkpoint, of which only config.json is read.",
    flag_values=FLAGS,
)
_CLUSTER = flags.DEFINE_string(
    "cluster", "a100_64gb_2x8", "A name in mesh_configs, or a Python file with get_cluster().", flag_values=FLAGS
)
_SEQ_LEN = FLAGS.define_numbers("seq_len", [128, 1024, 4096, 10_240], "Tokens of a sequence, one plan for each.")
_BATCH_SIZE = FLAGS.define_numbers(
    "batch_size", [], "Sequences of a step over all devices: one number, or one for each length. Default: fewer, the "
    "longer they are (128 of 128 tokens to 32 of 10,240 on 16 devices).",
)  # fmt: skip
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "prefill", "decode"],
    "What is planned: a training step, the forward pass of a batch, or one token more for each sequence.",
    flag_values=FLAGS,
)  # fmt: skip
_CALIBRATION = flags.DEFINE_string(
    "calibration", None, "Figures of the device as experiments/calibrate.py wrote them.", flag_values=FLAGS
)
_CAPACITY = flags.DEFINE_float(
    "capacity_factor",
    1.5,
    "Room of the dispatch's buffers over the balanced load.",
    1e-3,
    MAX_CAPACITY_FACTOR,
    flag_values=FLAGS,
)
_OUT = FLAGS.define_output("out", "Where to write the plan as a file that train.py --plan takes.", ".py")
_JSON = FLAGS.define_output("json", "Where to write the figures as JSON.")
_PLOT = FLAGS.define_output("plot", "Where to draw memory and time; needs the extra plots.", *SUFFIXES)


def main(argv: list[str]) -> None:
    FLAGS.parse(argv)
    check(
        _OUT.value is None or _MODE.value == "train",
        f"--out={_OUT.value} is for train.py; use it with --mode=train, not {_MODE.value}",
    )
    requests = make_requests()
    choices = {request.seq_len: find_plan(request) for request in requests}
    print(render(requests, choices))
    if _OUT.value:
        write_plan(_OUT.value, choices)
    data = {
        "model": _MODEL.value, "cluster": _CLUSTER.value, "mode": _MODE.value,
        "choices": {seq_len: report.as_data(choice) for seq_len, choice in choices.items()},
    }  # fmt: skip
    if _JSON.value:
        _JSON.value.write_text(strict_json.dumps(data, indent=1) + "\n")
    if _PLOT.value:
        title = f"{_MODEL.value} on {_CLUSTER.value}, {_MODE.value}, as planned"
        report.figure(choices, requests[0].limit_bytes, title).savefig(_PLOT.value, dpi=120)
    loading.print_json(data)


def make_requests() -> list[Request]:
    """What the flags ask for, the shortest length first."""
    model, cluster = loading.load_model(_MODEL.value), loading.load_cluster(_CLUSTER.value)
    if _CALIBRATION.value is not None:
        cluster = dataclasses.replace(cluster, device=load_calibration(_CALIBRATION.value, cluster.device))
    lengths = _SEQ_LEN.value
    check(len({*lengths}) == len(lengths), f"--seq_len={','.join(map(str, lengths))} has a length twice; give it once")
    batch_sizes = _BATCH_SIZE.value or [default_batch_size(n, cluster.num_devices) for n in lengths]
    if len(batch_sizes) == 1:
        batch_sizes = batch_sizes * len(lengths)
    if len(batch_sizes) != len(lengths):
        given = ",".join(map(str, batch_sizes))
        raise ConfigError(
            f"--batch_size={given} has {len(batch_sizes)} numbers for {len(lengths)} lengths; give one, or one for each"
        )
    dispatch = DispatchConfig(capacity_factor=_CAPACITY.value)
    return [
        Request(model, cluster, n, b, _MODE.value, dispatch=dispatch)
        for n, b in sorted(zip(lengths, batch_sizes, strict=True))
    ]


def render(requests: list[Request], choices: dict[int, Choice]) -> str:
    """All tables."""
    device = requests[0].cluster.device
    cluster = requests[0].cluster
    parts = [
        f"{_MODEL.value} on {_CLUSTER.value}: {cluster.hosts} × {cluster.devices_per_host} {device.name}, "
        f"{requests[0].limit_bytes / 1e9:.1f} GB usable of each, {_MODE.value}",
        report.choice_table(choices),
        report.memory_table(choices),
        report.time_table(choices),
        *(report.why(request, choices[request.seq_len]) for request in requests),
        "The most that arithmetic allows, with matrix products at 55% of the achievable rate:",
        "\n".join(f"{request.seq_len:,}: {report.ceiling_lines(request)}" for request in requests),
    ]
    return "\n\n".join(parts)


def write_plan(path: Path, choices: dict[int, Choice]) -> None:
    """Writes the layouts as a plan file, and prints the command that follows it."""
    layouts = tuple(choice.best.layout for choice in choices.values())
    model, cluster = _MODEL.value, _CLUSTER.value
    if model not in loading.config_names():  # a file or a folder, which is then found from any other
        model = str((loading.find(model, loading.CONFIGS) or Path(model).expanduser()).resolve())
    write_plan_file(path, layouts, model, f"{_plain_stem(model)} on {_plain_stem(cluster)}, training")
    print(f"wrote {path}; run it with {loading.command('train', f'--plan={path}')}", file=sys.stderr)


def _plain_stem(path: str) -> str:
    """Returns the name of a file, short enough for a title and without what a docstring cannot hold."""
    return "".join(c for c in Path(path).stem if c.isprintable() and c not in '"\\')[:45]


if __name__ == "__main__":
    loading.run(main, FLAGS)
