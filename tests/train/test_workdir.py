"""The lock of a work directory: one run at a time, and no killed run in the way of the next."""

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from moejax.checks import ConfigError
from moejax.train import workdir as workdir_module
from moejax.train.workdir import LOCK_FILE, STALE_SECONDS, WorkdirLock, check_folder

HOLD = (
    "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, 2); print(flush=True); time.sleep(600)"
)


def error_of(function, *arguments):
    with pytest.raises(ConfigError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def leave_behind(folder, age=0.0, **owner):
    """What a run that was killed `age` seconds ago leaves in its work directory."""
    path = folder / LOCK_FILE
    path.write_text(json.dumps({"host": platform.node(), "pid": 4242, "started": "2026-01-02 03:04:05 +0000"} | owner))
    os.utime(path, (time.time() - age,) * 2)
    return path


class TestLock:
    def test_a_second_run_is_refused_until_the_first_has_ended(self, tmp_path):
        lock = WorkdirLock(tmp_path / "run")
        for _ in range(2):  # a lock can be taken again
            with lock:
                for again in (WorkdirLock(tmp_path / "run").check_possible, WorkdirLock(tmp_path / "run").__enter__):
                    message = error_of(again)
                    assert (
                        f"workdir={tmp_path / 'run'} is in use by process {os.getpid()} on {platform.node()}" in message
                    )
                    assert "wait until it has ended, or use another workdir" in message
            WorkdirLock(tmp_path / "run").check_possible()

    def test_an_exception_frees_it(self, tmp_path):
        with pytest.raises(FloatingPointError), WorkdirLock(tmp_path):
            raise FloatingPointError
        with WorkdirLock(tmp_path):
            pass

    @pytest.mark.skipif(sys.platform == "win32", reason="the lock is of POSIX systems")
    def test_it_dies_with_its_process(self, tmp_path):
        path = leave_behind(tmp_path)
        holder = subprocess.Popen(
            [sys.executable, "-S", "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        holder.stdout.readline()
        assert "is in use by process 4242" in error_of(WorkdirLock(tmp_path).check_possible)
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
        with WorkdirLock(tmp_path):
            assert json.loads(path.read_text())["pid"] == os.getpid()

    def test_a_run_on_another_host_is_refused_while_it_shows_signs_of_life(self, tmp_path):
        path = leave_behind(tmp_path, host="elsewhere")
        message = error_of(WorkdirLock(tmp_path).check_possible)
        assert "is in use by process 4242 on elsewhere, since 2026-01-02 03:04:05 +0000" in message
        assert f"delete {path}" in message
        leave_behind(tmp_path, age=STALE_SECONDS + 1, host="elsewhere")
        with WorkdirLock(tmp_path):
            assert json.loads(path.read_text())["host"] == platform.node()

    @pytest.mark.parametrize("content", [b"12345", b"{}", b'{"host": "other"}', b"[1]", b"null", b"\xff\xfe", b"{"])
    def test_a_file_that_no_run_wrote_is_taken_over(self, tmp_path, content):
        (tmp_path / LOCK_FILE).write_bytes(content)
        WorkdirLock(tmp_path).check_possible()
        with WorkdirLock(tmp_path):
            assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()

    def test_a_sign_of_life_from_the_future_counts_as_long_as_one_from_the_past(self, tmp_path):
        leave_behind(tmp_path, age=-STALE_SECONDS / 2, host="elsewhere")
        assert "(its last sign of life was " in error_of(WorkdirLock(tmp_path).check_possible)
        leave_behind(tmp_path, age=-STALE_SECONDS - 60, host="elsewhere")
        with WorkdirLock(tmp_path):
            pass

    def test_without_the_systems_locks_signs_of_life_decide(self, tmp_path, monkeypatch):
        monkeypatch.setattr(workdir_module, "_try_lock", lambda _: None)
        with WorkdirLock(tmp_path):
            assert f"delete {tmp_path / LOCK_FILE}" in error_of(WorkdirLock(tmp_path).check_possible)
        with WorkdirLock(tmp_path):
            pass
        leave_behind(tmp_path, age=STALE_SECONDS + 1)
        with WorkdirLock(tmp_path):
            pass

    def test_a_run_shows_that_it_is_alive(self, tmp_path, monkeypatch):
        monkeypatch.setattr(workdir_module, "BEAT_SECONDS", 0.001)
        with WorkdirLock(tmp_path) as lock:
            os.utime(lock.path, (0, 0))
            deadline = time.monotonic() + 60
            while lock.path.stat().st_mtime == 0 and time.monotonic() < deadline:
                time.sleep(0.001)
            assert lock.path.stat().st_mtime > 0

    def test_only_process_0_takes_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr(workdir_module.jax, "process_index", lambda: 1)
        with WorkdirLock(tmp_path / "run"), WorkdirLock(tmp_path / "run"):
            WorkdirLock(tmp_path / "run").check_possible()
        assert not (tmp_path / "run").exists()


class TestFolder:
    def test_a_check_leaves_nothing_behind(self, tmp_path):
        assert check_folder(tmp_path / "a" / "b", "workdir") == tmp_path / "a" / "b"
        WorkdirLock(tmp_path / "a" / "b").check_possible()
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("place", ["file", "file/run", "/proc/none/run", "a" * 300])
    def test_one_that_cannot_be_made_is_one_line(self, tmp_path, monkeypatch, place):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").write_text("")
        assert error_of(check_folder, place, "--workdir").startswith(f"--workdir={place} cannot be a folder (")
        assert error_of(WorkdirLock(place).check_possible).startswith(f"workdir={place} cannot be a folder (")

    def test_one_that_takes_no_files_is_one_line(self, tmp_path, monkeypatch):
        def refuse(dir):  # as root, every folder takes them
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
        for place, cannot in ((tmp_path, "be written into"), (tmp_path / "new", "be a folder")):
            message = f"--workdir={place} cannot {cannot} (Permission denied); give another"
            assert error_of(check_folder, place, "--workdir") == message

    def test_a_lock_on_a_full_disk_is_one_line_and_leaves_the_folder_free(self, tmp_path, disk):
        disk.room = 0
        assert f"cannot be written to (No space left on device: {tmp_path / LOCK_FILE})" in error_of(
            WorkdirLock(tmp_path).__enter__
        )
        disk.room = float("inf")
        with WorkdirLock(tmp_path):
            pass

    def test_a_lock_that_cannot_be_opened_is_one_line(self, tmp_path):
        (tmp_path / LOCK_FILE).mkdir()
        assert f"cannot be written to (Is a directory: {tmp_path / LOCK_FILE})" in error_of(
            WorkdirLock(tmp_path).check_possible
        )
