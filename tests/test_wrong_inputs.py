"""What a newcomer types wrong, and the one line that says what would be right: also the table of those lines."""

import pytest
from scripts import run_script

CASES = [
    # Flags of other programs, and flags misspelled.
    ("train --lr=1e-4", "--lr does not exist; did you mean --config.optimizer.learning_rate? --help lists all"),
    ("train --steps 20", "--steps does not exist; did you mean --config.steps? --help lists all"),
    ("train --batch-size=8", "--batch-size does not exist; did you mean --config.layout.batch_size? --help lists all"),
    ("train --epochs=3", "--epochs does not exist; did you mean --config.steps? --help lists all"),
    (
        "train --layers=8",
        "--layers does not exist; did you mean --config.model.num_layers or --config.model.num_dense_layers? "
        "--help lists all",
    ),
    ("train --model=small", "--model does not exist; did you mean --config? --help lists all"),
    ("train -gpus=8", "--gpus does not exist; did you mean --mesh? --help lists all"),
    ("train --tokeniser=bpe", "--tokeniser does not exist; did you mean --tokenizer? --help lists all"),
    ("plan --config=tiny", "--config does not exist; did you mean --model? --help lists all"),
    # Flags without their dashes or their value.
    (
        "train --config steps=20",
        "--config=steps=20 does not exist; did you mean --config.steps=20? use one of load_balance, mixed, ",
    ),
    ("train steps=20", "argument steps=20 is no flag; did you mean --config.steps=20? flags start with --"),
    ("train small", "argument small is no flag; did you mean --config=small? flags start with --"),
    ("train --config.steps", "--config.steps needs a value; write --config.steps=VALUE"),
    ("train --workdir --config=tiny", "--workdir needs a value; write --workdir=VALUE"),
    ("train --workdir", "--workdir needs a value; write --workdir=VALUE"),
    ("train --data=", "--data= names no file, glob or folder; leave out --data for Python's own library"),
    ("train --config.data.paths=,", "--data= names no file, glob or folder; leave out --data for Python's own library"),
    ("load_balance --methods=", "--methods= needs one value at least; leave out --methods for the default"),
    ("overlap --target=", "--target= needs one value at least; leave out --target for the default"),
    # Flags of absl that no script takes.
    ("train --flagfile", "--flagfile is not supported; give the flags themselves"),
    ("plan --flagfile=flags.txt", "--flagfile is not supported; give the flags themselves"),
    ("train --undefok=lr --lr=1", "--undefok is not supported; give the flags themselves"),
    ("plan --help=foo", "--help takes no value but full"),
    # Names.
    ("train --config=tinny", "--config=tinny does not exist; did you mean tiny? use one of "),
    ("train --mesh=cpu16", "--mesh=cpu16 does not exist; did you mean cpu_16? use one of "),
    ("train --config=mine.py", "mine.py does not exist; use a Python file with get_config() -> TrainConfig"),
    (
        "memory --target=h100",
        "--target=h100 does not exist; use one of a100_64gb_2x8, h100_2x8, tpu_v5p_16, tpu_v5e_16",
    ),
    ("train --config=a\x1b[31mb", r"--config=a\x1b[31mb does not exist; use one of "),
    ("train --mesh=" + 300 * "a" + ".py", 80 * "a" + "… cannot be read (File name too long); use a Python file with "),
    ("plan --model=" + 300 * "a", "--model=" + 72 * "a" + "… does not exist; use one of "),
    ("train --mesh=cpu_16_mixed", "--mesh=cpu_16_mixed is a plan; write --plan=cpu_16_mixed"),
    ("train --plan=cpu_16", "--plan=cpu_16 does not exist; did you mean cpu_16_mixed? use one of cpu_16_mixed, or a "),
    ("train --plan=mine.py", "--plan=mine.py is no file; experiments/plan.py writes plans"),
    ("train cpu_16_mixed", "argument cpu_16_mixed is no flag; did you mean --plan=cpu_16_mixed? flags start with --"),
    # Fields of version 0.1, fields in another place, and fields that a plan decides.
    ("train --config.accumulate=2", "--config.accumulate is called --config.layout.grad_accumulation_steps now"),
    ("memory --config.parallel.remat=full", "--config.parallel.remat is called --config.layout.remat now"),
    ("train --config.layout.mesh.expert=2", "--config.layout.mesh.expert is --mesh.expert"),
    (
        "train --plan=cpu_16_mixed --mesh=single",
        "--mesh=single and --plan=cpu_16_mixed both say where to run; give one",
    ),
    (
        "train --plan=cpu_16_mixed --config.layout.remat=full",
        "--config.layout.remat cannot be changed: --plan=cpu_16_mixed is a plan, which decides it; change the plan's "
        "file, or use --mesh instead of --plan",
    ),
    # Values.
    ("train --config.steps=1e3", "--config.steps='1e3' must be a whole number (int)"),
    (
        "train --config.model.dtype=bf16",
        "--config.model.dtype='bf16' must be one of float32, bfloat16, float16; did you mean bfloat16?",
    ),
    (
        "train --config.model.attention.num_heads=3",
        "--config.model.attention.num_heads=3 must be a multiple of num_kv_heads=2",
    ),
    (
        "train --config.model.num_experts=15",
        "--config.model.num_experts=15 must be a multiple of expert × tensor = 8; "
        "try num_experts=16, or expert × tensor = 1, 3 or 5",
    ),
    (
        "train --config.layout.batch_size=12",
        "--config.layout.batch_size=12 must be a multiple of 8 = expert 4 × num_microbatches 2; try 8",
    ),
    (
        "train --config.layout.seq_len=20000",
        "--config.layout.seq_len=20000 must be at most model.max_seq_len=10240",
    ),
    ("plan --seq_len=64,128,64", "--seq_len=64,128,64 has a length twice; give it once"),
    ("plan --seq_len=64,20480", "--seq_len=20480 must be at most the model's max_seq_len=10240"),
    ("plan --seq_len=1k", "--seq_len=1k: '1k' must be a whole number of at least 1"),
    ("overlap --chunks=two", "--chunks=two: 'two' must be a whole number of at least 1"),
    ("plan --calibration=nope.json", "--calibration=nope.json cannot be read ("),
    # Home folders of users that there are not, and names that the system refuses.
    *(
        (command, f"{argument} needs a home folder that is not known; write the whole path")
        for command, argument in (
            ("train --config=~nosuchuser/a.py", "~nosuchuser/a.py"),
            ("train --mesh=~nosuchuser/a.py", "~nosuchuser/a.py"),
            ("train --workdir=~nosuchuser/run", "--workdir=~nosuchuser/run"),
            ("train --compilation_cache_dir=~nosuchuser/xla", "--compilation_cache_dir=~nosuchuser/xla"),
            ("plan --model=~nosuchuser/a.py", "~nosuchuser/a.py"),
            ("plan --cluster=~nosuchuser/a.py", "~nosuchuser/a.py"),
            ("plan --calibration=~nosuchuser/a.json", "--calibration=~nosuchuser/a.json"),
            ("published_runs/planner_accuracy --runs=~nosuchuser/a.csv", "--runs=~nosuchuser/a.csv"),
            ("plot_load --workdir=~nosuchuser/run", "--workdir=~nosuchuser/run"),
            ("read_trace ~nosuchuser/run", "TRACE=~nosuchuser/run"),
        )
    ),
    ("plan --batch_size=1" + "0" * 30, f"--batch_size=1{'0' * 30}: '1{'0' * 30}' must be at most 2,147,483,647"),
    ("plan --seq_len=2147483648", "--seq_len=2147483648: '2147483648' must be at most 2,147,483,647"),
    ("plan --capacity_factor=1e400", "--capacity_factor=1e400 must be a number in the range [0.001, 1000000.0]"),
    ("plan --calibration=", "--calibration= is not a regular file"),
    (
        "train --profile_steps=1:" + "9" * 20,
        "--profile_steps=1:"
        + "9" * 20
        + " must be FIRST:END with 1 <= FIRST < END <= 111; 10:13 is steps 10, 11 and 12",
    ),
    # Outputs.
    ("plan --json=no/plan.json", "--json=no/plan.json is in a folder that does not exist; make no first"),
    ("plan --mode=decode --out=plan.py", "--out=plan.py is for train.py; use it with --mode=train, not decode"),
    ("memory --out=memory.txt", "--out=memory.txt must end in .png, .svg, .pdf"),
]


@pytest.mark.parametrize(("command", "line"), CASES, ids=[command for command, _ in CASES])
def test_a_wrong_input_is_one_line_and_nothing_is_written(command, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_script(*command.split(), status=2)
    assert done.error.startswith(line)
    assert done.error == line or line.endswith((" ", "("))
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
