"""Compiles plans for accelerators that are not there and holds the planner's prediction against the compiler.

    python experiments/audit.py --config=moe_16x10b --target=h100_2x8 --config.layout.remat=full   # one plan
    python experiments/audit.py --lines=1,13 --max_error=0.1    # these lines of the grid, compiled now
    python experiments/audit.py --grid                          # all of it: compiles what has no record yet

A plan is the configuration's, on the mesh of the target's name. Its table has what the compiler can tell apart:
arguments (parameters, optimizer, batch) and temporaries; the prediction's categories follow, then FLOPs and bytes sent,
of the trace and of the compiled program. The grid is that of
`audit_cases`; its table is written to results/memory_audit.md. With --max_error the status is 1 where a prediction is
further off. Compiling needs the extra `aot`. In a pipe, ends with one line of JSON.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments.shared import audit_cases, common, loading, outputs
from experiments.shared.audit_cases import Audited, Case, Compiled
from moejax.checks import check
from moejax.config import BalanceConfig
from moejax.mesh import build_mesh
from moejax.planner.memory import Memory, predict_memory
from moejax.profiling.compiled import against_program, compiled_counts
from moejax.program import Program
from moejax.topology import compile_only_devices
from moejax.train.config import TrainConfig
from moejax.train.step import make_train_step

FLAGS = common.ConfigFlags(__doc__, config="moe_16x10b")
_TARGET = flags.DEFINE_string("target", "h100_2x8", "What to compile for, see moejax.topology.", flag_values=FLAGS)
_LINES = FLAGS.define_numbers("lines", [], "Lines of the grid to compile, counted from 1.")
_GRID_FLAG = flags.DEFINE_boolean(
    "grid", False, "Audit every line of the grid; compiles those without a record.", flag_values=FLAGS
)
_MAX_ERROR = flags.DEFINE_float(
    "max_error", None, "The largest relative error that passes.", lower_bound=0, flag_values=FLAGS
)
_OUT = FLAGS.define_output("out", "Where --grid's table goes. Default: experiments/results/memory_audit.md.")


def main(argv: list[str]) -> int:
    config = FLAGS.parse_config(argv)
    if _GRID_FLAG.value:
        audited = audit_grid(_OUT.value or outputs.check_output(audit_cases.FOLDER / "results" / "memory_audit.md"))
    elif _LINES.value:
        audited = audit_lines(_LINES.value)
    else:
        audited = [audit_one(FLAGS.for_target(_TARGET.value, config), _TARGET.value)]
    summary = audit_cases.summary(audited)
    loading.print_json({"groups": summary, "errors": [round(a.error, 4) for a in audited]})
    return int(_MAX_ERROR.value is not None and summary["all"]["worst_error"] > _MAX_ERROR.value)


def audit_one(config: TrainConfig, target: str) -> Audited:
    """Compiles the step of a configuration and prints it category by category."""
    case = Case(FLAGS.config, target, config.model, config.layout, used_for_fitting=False)
    compiled, executable = compile_step(case, config.compiler_options)
    predicted = predict_memory(case.model, case.layout)
    print("\n".join([*categories(predicted, compiled), "", *counts(case, executable)]))
    return Audited.of(case, compiled)


def audit_lines(numbers: list[int]) -> list[Audited]:
    """Compiles these lines of the grid, whether they have a record or not, and leaves the record as it is."""
    grid = audit_cases.read_grid()
    for number in numbers:
        check(1 <= number <= len(grid), f"lines={number} must be between 1 and {len(grid)}, the grid's last")
    print(audit_cases.HEADER)
    audited = []
    for number in numbers:
        case = Case.parse(grid[number - 1])
        audited.append(Audited.of(case, compile_step(case)[0]))
        print(audited[-1].line, flush=True)
    return audited


def audit_grid(out: Path) -> list[Audited]:
    """Compiles what has no record, adds it, and writes the table of all."""
    record = audit_cases.read_record()
    for row in audit_cases.read_grid():
        if audit_cases.key(row) not in record:
            case = Case.parse(row)
            compiled, _ = compile_step(case)
            audit_cases.append_record(row, compiled)
            print(Audited.of(case, compiled).line, flush=True)
    return write_table(out)


def write_table(path: Path) -> list[Audited]:
    """The table of all that was compiled, printed and written."""
    audited = audit_cases.recorded()
    table = [audit_cases.summary_table(audited), "", audit_cases.HEADER, *(a.line for a in audited)]
    print("\n".join(table))
    versions = ", ".join(sorted({a.compiled.jax for a in audited}))
    path.write_text("\n".join([*_preface(versions), *table]) + "\n")
    return audited


def _preface(versions: str) -> list[str]:
    return [
        "# Peak memory of a device: predicted, and compiled",
        "",
        f"`python experiments/audit.py --grid`, compiled with jax {versions}. What is fitted was at hand while the "
        "formulas were written; what is held out was marked before, and nothing was changed for it. A batch is "
        "sequences × tokens; parts of a microbatch are as many as `batch_split` comes to unless said. A GPU's compiler "
        "gives no error where a plan is too large for its memory, so such plans are here, too.",
        "",
    ]


def compile_step(case: Case, compiler_options: tuple[str, ...] = ()) -> tuple[Compiled, Any]:
    """Compiles the train step of a case; also returns what JAX made of it."""
    mesh, balance = build_mesh(case.layout.mesh, compile_only_devices(case.target)), BalanceConfig.suited_to(case.model)
    lowered = make_train_step(Program(case.model, case.layout, mesh, balance, compiler_options)).lower()
    began = time.perf_counter()
    executable = lowered.compile()
    compile_s = time.perf_counter() - began
    memory = executable.memory_analysis()
    figures = Compiled(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        compile_s=round(compile_s, 1),
        jax=jax.__version__,
    )
    return figures, executable


def categories(predicted: Memory, compiled: Compiled) -> list[str]:
    """Markdown: what both sides know, then the prediction's parts."""
    parts = predicted.categories
    arguments = sum(parts[name] for name in ("parameters", "optimizer", "batch"))
    rows: list[tuple[Any, ...]] = [
        ("arguments", arguments, compiled.argument_bytes),
        ("the rest", predicted.peak_bytes - arguments, compiled.peak_bytes - compiled.argument_bytes),
        ("peak", predicted.peak_bytes, compiled.peak_bytes),
    ]
    lines = ["| | predicted, GB | compiled, GB | error |", "|---|---|---|---|"]
    lines += [f"| {name} | {a / 1e9:.3f} | {b / 1e9:.3f} | {a / b - 1:+.1%} |" for name, a, b in rows]
    lines += [f"| {name.replace('_', ' ')} | {size / 1e9:.3f} | | |" for name, size in parts.items() if size]
    return [*lines, "", f"The peak is in the {predicted.moment}; compiled in {compiled.compile_s:.0f} s."]


def counts(case: Case, executable: Any) -> list[str]:
    """Markdown: FLOPs of matrix products and bytes sent to other devices, traced and compiled."""
    lines = ["| | traced | compiled | error |", "|---|---|---|---|"]
    found = compiled_counts(executable, case.model, case.layout)
    for name, (traced, compiled) in against_program(case.model, case.layout, found).items():
        label, unit = ("matrix products, TFLOP", 1e12) if name == "flops" else (f"{name}, GB sent", 1e9)
        if compiled:
            lines.append(f"| {label} | {traced / unit:.3f} | {compiled / unit:.3f} | {traced / compiled - 1:+.1%} |")
    return lines


if __name__ == "__main__":
    loading.run(main, FLAGS)
