"""One line a step, valid JSON whatever the values, through kills and resumptions."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moejax.checks import ConfigError
from moejax.plots import pyplot
from moejax.train.load_image import encode_png, load_image
from moejax.train.metrics import MetricsWriter, read_loads, read_metrics


def test_reads_back_what_was_written(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.1, "tokens": 3, "jax": jnp.float32(0.5), "numpy": np.float64(1e-300)})
        assert len(read_metrics(tmp_path)) == 1, "the line must be readable before the writer is closed"
        writer.write(2, {"loss": 0.2})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.1, "tokens": 3.0, "jax": 0.5, "numpy": 1e-300},
        {"step": 2, "loss": 0.2},
    ]


def strict(line):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_not_finite_values_are_valid_json_and_come_back(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": jnp.float32(-jnp.inf)})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert strict(line) == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    [record] = read_metrics(tmp_path)
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


def test_resumed_run_has_one_line_a_step(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 8):
            writer.write(step, {"run": 1})
    with MetricsWriter(tmp_path, resume_step=4) as writer:
        for step in range(5, 10):
            writer.write(step, {"run": 2})
    assert [(r["step"], r["run"]) for r in read_metrics(tmp_path)] == [(s, 1 if s <= 4 else 2) for s in range(1, 10)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loads.jsonl", "metrics.jsonl", "tensorboard"]


def test_new_run_in_the_same_directory_starts_over(tmp_path):
    for run in (1, 2):
        with MetricsWriter(tmp_path) as writer:
            writer.write(1, {"run": run})
    assert read_metrics(tmp_path) == [{"step": 1, "run": 2.0}]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1}', "\udcff", ""])
def test_torn_last_line_is_left_out_and_written_over(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1}\n{"step": 2, "loss": 1}\n' + torn.encode(errors="surrogateescape"))
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, {"loss": 3})
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 1), (2, 1), (3, 3)]


def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 2 is not a JSON object"):
        read_metrics(path)
    with pytest.raises(ConfigError, match="line 2"):
        MetricsWriter(tmp_path, resume_step=3)
    assert path.read_text() == '{"step": 1}\nrubbish\n{"step": 3}\n', "the file must be as it was"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 2000) | st.just(10**9), min_size=1, max_size=12))
def test_a_full_disk_leaves_whole_lines_and_never_ends_the_run(disk, tmp_path_factory, rooms):
    workdir = tmp_path_factory.mktemp("run")
    whole = []
    with MetricsWriter(workdir) as writer:
        for step, room in enumerate(rooms, start=1):
            disk.room = room
            writer.write(step, {"loss": step / 3}, np.full((2, 4), step))
            if disk.room > 0:
                whole.append(step)
            writer.write_by_layer(step, {"load_cv": np.float32([0.5])}, np.ones((2, 4)))
        disk.room = 10**9
        writer.write(100, {"loss": 0})
    lines = [strict(line) for line in (workdir / "metrics.jsonl").read_bytes().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    assert set(steps) >= {*whole, 100}
    assert all(line["loss"] == line["step"] / 3 for line in lines[:-1])
    loads_N, load_NLE = read_loads(workdir)
    assert set(loads_N) >= set(whole)
    assert (load_NLE == loads_N[:, None, None]).all()
    drawn = {e.step for e in _events(workdir / "tensorboard") for v in e.summary.value if v.tag == "loss"}
    assert drawn >= {*whole, 100}


def test_a_full_disk_is_told_once_and_so_is_its_end(disk, tmp_path, caplog):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 41):
            disk.room = 0 if step in range(3, 15) or step >= 20 else 10**9
            writer.write(step, {"loss": 1}, np.ones((2, 4)))
    full = f"metrics are not written whole: No space left on device: {tmp_path / 'metrics.jsonl'}. Training goes on"
    assert [message.removesuffix(" without them.") for message in caplog.messages] == [
        f"Step 3: {full}",
        f"Step 12: {full}",
        f"Step 15: metrics are written again; 12 writes to {tmp_path} are missing so far.",
        f"Some metrics could not be written; 33 writes to {tmp_path} are missing so far.",
    ]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, *range(15, 20)]


def test_a_disk_that_is_still_full_at_the_end_is_told(disk, tmp_path, caplog):
    with MetricsWriter(tmp_path) as writer:
        disk.room = 0
        writer.write(1, {"loss": 1})
    assert caplog.messages[1:] == [f"Some metrics could not be written; 1 writes to {tmp_path} are missing so far."]


def test_resuming_needs_no_room_for_what_is_dropped(disk, tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": step})
    disk.room = 1000  # what TensorBoard's new file begins with
    with MetricsWriter(tmp_path, resume_step=2):
        assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    disk.room = 0
    with pytest.raises(OSError, match=r"No space left on device: .*tensorboard/events"):
        MetricsWriter(tmp_path, resume_step=2)


def test_errors_name_the_argument(tmp_path):
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        with pytest.raises(ValueError, match="step=3 must be more than 3"):
            writer.write(3, {})
        with pytest.raises(ValueError, match=r"metrics\['loss'\]=\[1\] must be a scalar"):
            writer.write(4, {"loss": [1]})
        with pytest.raises(ValueError, match="'step'"):
            writer.write(4, {"step": 4})
        writer.write(4, {"loss": 1})
    with pytest.raises(ValueError, match="resume_step=-1"):
        MetricsWriter(tmp_path, resume_step=-1)


def test_loads_come_back_and_survive_what_the_metrics_survive(tmp_path):
    load_NLE = np.random.default_rng(0).integers(0, 100_000, (9, 2, 4))
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 8):
            load_LE = load_NLE[step - 1] if step <= 4 else np.zeros((2, 4))
            writer.write(step, {"run": 1}, load_LE.astype(np.float32))
            assert len(read_loads(tmp_path)[0]) == step, "the line must be readable before the writer is closed"
    with (tmp_path / "loads.jsonl").open("a") as file:
        file.write('{"step":8,"load_LE":[[1,2')  # as a kill leaves it
    assert read_loads(tmp_path)[0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    with MetricsWriter(tmp_path, resume_step=4) as writer:
        for step in range(5, 10):
            writer.write(step, {"run": 2}, load_NLE[step - 1])
    steps_N, read_NLE = read_loads(tmp_path / "loads.jsonl")
    assert steps_N.tolist() == [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 10))
    np.testing.assert_array_equal(read_NLE, load_NLE)
    assert read_NLE.dtype == np.int64


def test_loads_of_ten_thousand_steps_are_small(tmp_path):
    """Of 16 layers × 16 experts: 327,680 tokens to 2 experts each."""
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {}, np.full((16, 16), 40_960))
    assert 10_000 * (tmp_path / "loads.jsonl").stat().st_size < 16e6


def test_tensorboard_gets_a_scalar_a_layer(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write_by_layer(3, {"load_cv": np.float32([0.5, 0.25])}, np.ones((2, 4)))
    values = {v.tag: v for e in _events(tmp_path / "tensorboard") for v in e.summary.value if e.step == 3}
    image = values.pop("window_load/layer_by_expert").image
    assert (image.width, image.height, image.colorspace) == (4 * 24, 2 * 24, 3)
    assert {tag: v.simple_value for tag, v in values.items()} == {"load_cv/layer_00": 0.5, "load_cv/layer_01": 0.25}


def test_the_picture_of_loads_is_white_where_they_are_even():
    load_LE = np.array([[4, 4, 4, 4], [0, 2, 4, 2], [0, 0, 0, 0]])
    image = load_image(load_LE)
    assert image.shape == (3 * 24, 4 * 24, 3)
    cells = image[12::24, 12::24].tolist()
    white, red, blue = [255, 255, 255], [178, 24, 43], [33, 102, 172]
    assert cells == [[white] * 4, [blue, white, red, white], [blue] * 4]
    assert load_image(np.ones((1, 1000))).shape == (1, 1000, 3)  # a pixel an expert, at least


def test_a_png_is_read_as_it_was_written(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    path.write_bytes(encode_png(image))
    read = pyplot().imread(path)  # by matplotlib's own decoder, as numbers from 0 to 1
    np.testing.assert_array_equal(np.round(255 * read[..., :3]).astype(np.uint8), image)


def test_tensorboard_gets_the_same_scalars_and_hides_the_dropped_ones(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5})
        writer.write(2, {"loss": 0.25})
    with MetricsWriter(tmp_path, resume_step=1) as writer:
        writer.write(2, {"loss": 0.75})
    events = _events(tmp_path / "tensorboard")
    assert [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value] == [
        (1, "loss", 0.5),
        (2, "loss", 0.25),
        (2, "loss", 0.75),
    ]
    starts = [e.step for e in events if e.HasField("session_log")]
    assert starts == [1, 2], "a session that starts at step s hides what came at s and later before it"


def _events(directory):
    """Parses TensorBoard's files: records of u64 length, u32 CRC, an Event message, u32 CRC."""
    from tensorboardX.proto import event_pb2

    events = []
    for path in sorted(directory.iterdir()):  # their names end with the time at which they were made
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    return events
