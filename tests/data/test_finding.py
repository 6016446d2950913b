"""Paths name what exists under exactly that name, then a glob; walking ends, and leaves out what is no corpus."""

import errno
import logging
import os

import pytest

from moejax.checks import ConfigError
from moejax.config import DataConfig
from moejax.data import load_corpus
from moejax.overrides import apply_overrides

ODD_NAMES = [
    "a[1]",
    "[ab]",
    "a*b",
    "a?",
    "[",
    "back\\slash",
    "100%",
    "a b",
    " a",
    "a,b",
    "-a",
    "~",
    "~a",
    "new\nline",
    "é",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name!r}\n")
    return folder


def names(*paths, workdir=None):
    return [document.name for document in load_corpus([str(path) for path in paths], workdir)]


def message(*paths):
    with pytest.raises(ConfigError) as error:
        load_corpus(paths)
    assert "\n" not in str(error.value)
    return str(error.value)


class TestNames:
    @pytest.mark.parametrize("name", ODD_NAMES)
    @pytest.mark.parametrize("absolute", [False, True])
    def test_an_existing_name_is_taken_literally(self, here, name, absolute):
        write(here, f"{name}.txt", f"{name}/c.txt", "a1.txt", "a1/other.txt", "b.txt")
        base = f"{here}/" if absolute else ""
        assert names(f"{base}{name}.txt") == [f"{name}.txt"]
        assert names(f"{base}{name}") == [f"{name}/c.txt"]
        assert names(f"{base}{name}/c.txt") == ["c.txt"]

    @pytest.mark.parametrize("name", ODD_NAMES)
    def test_a_glob_works_below_a_folder_of_any_name(self, here, name):
        write(here, f"{name}/c.txt", f"{name}/deep/d.txt", "a1/other.txt")
        assert names(here / name / "*.txt") == ["c.txt"]
        assert names(f"{name}/**/[cd].txt") == ["c.txt", "deep/d.txt"]

    @pytest.mark.parametrize("name", ["a,b.txt", "a, b.txt", " a.txt", "a.txt ", "a,b"])
    def test_a_whole_name_with_commas_and_spaces_can_be_given_on_the_command_line(self, here, name):
        write(here, name, "a", "c.txt")
        assert apply_overrides(DataConfig(), {"paths": name}).paths == (name,)
        assert apply_overrides(DataConfig(), {"paths": f"{here}/{name}"}).paths == (f"{here}/{name}",)
        assert apply_overrides(DataConfig(), {"paths": "a, c.txt"}).paths == ("a", "c.txt")

    def test_a_name_that_is_not_utf8(self, here):
        name = os.fsdecode(b"caf\xe9.txt")
        write(here, name)
        assert names(here, name) == [f"{here.name}/{name}"]
        assert names(name) == names("caf?.txt") == [name]

    def test_home(self, here, monkeypatch):
        monkeypatch.setenv("HOME", str(write(here / "home[1]", "b.txt")))
        assert names("~/b.txt") == names("~/*.txt") == ["b.txt"]

    @pytest.mark.parametrize(
        "path", ["once upon a time " * 30, "x" * 300, "~nosuchuser/a.txt", "no\0ne", "a.txt/b", "\n"]
    )
    def test_error_of_no_such_name(self, here, path):
        write(here, "a.txt")
        assert message(path) == f"paths={path!r} does not exist; name a text file, a folder or a glob"

    def test_error_of_an_empty_name(self):
        assert message("") == "paths='' is empty; name a text file, a folder or a glob"

    @pytest.mark.parametrize("path", ["gs://bucket/*.txt", "hf://a/b", "https://a.org/b.txt"])
    def test_error_of_what_is_elsewhere(self, path):
        assert message(path) == f"paths={path!r} is not on this machine; download it and name a file or a folder"

    @pytest.mark.parametrize("what", ["a.txt", "*.txt"])
    def test_error_of_a_folder_that_may_not_be_entered(self, here, monkeypatch, what):
        path = str(write(here / "theirs", "a.txt") / what)
        refuse(monkeypatch, "stat", path)
        assert message(path).startswith(f"paths={path!r} cannot be read (Permission denied); name ")

    def test_error_of_a_folder_that_may_not_be_listed(self, here, monkeypatch):
        path = str(write(here / "theirs", "a.txt"))
        refuse(monkeypatch, "scandir", path)
        assert message(path).startswith(f"paths={path!r} cannot be read (Permission denied); name ")

    def test_one_path_is_not_many(self):
        with pytest.raises(ConfigError, match=r"^paths='a.txt' must be a tuple; write \('a.txt',\)$"):
            DataConfig(paths="a.txt")


def refuse(monkeypatch, function, refused):
    """Makes `os.<function>` fail for one path as the system would (root, who may run the tests, may do all)."""
    whole = getattr(os, function)

    def refusing(path, *args, **kwargs):
        if str(path) == refused:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), refused)
        return whole(path, *args, **kwargs)

    monkeypatch.setattr(os, function, refusing)


class TestGlobs:
    TREE = ("a.txt", "a.md", "b/a.txt", "b/c/a.txt", "b/c/d.txt", ".hidden/a.txt", "b/.a.txt")

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("*.txt", ["a.txt"]),
            ("*/a.txt", ["b/a.txt"]),
            ("**/a.txt", ["a.txt", "b/a.txt", "b/c/a.txt"]),
            ("**/**/a.txt", ["a.txt", "b/a.txt", "b/c/a.txt"]),
            ("**/c/*", ["b/c/a.txt", "b/c/d.txt"]),
            ("**", ["a.md", "a.txt", "b/a.txt", "b/c/a.txt", "b/c/d.txt"]),
            ("b/**/[!a].txt", ["c/d.txt"]),
            ("[b]/../*.md", ["b/../a.md"]),
            (".*/*.txt", [".hidden/a.txt"]),
            ("b/.*", [".a.txt"]),
        ],
    )
    def test_matches(self, here, pattern, expected):
        write(here, *self.TREE)
        assert names(pattern) == names(here / pattern) == expected

    def test_loops_of_links_end(self, here):
        """And give the files that the folder gives, once each."""
        write(here, "a/b/a.txt", "c/d/c.txt")
        for link, target in [("a/b/up", ".."), ("c/d/top", "../.."), ("self", "."), ("loop", "loop"), ("a/z", "../c")]:
            (here / link).symlink_to(target)
        assert names(here) == [f"{here.name}/a/b/a.txt", f"{here.name}/c/d/c.txt"]
        assert names("**/*.txt") == ["a/b/a.txt", "c/d/c.txt"]
        assert names("**/**/**/*.txt") == ["a/b/a.txt", "c/d/c.txt"]

    def test_a_link_in_a_named_place_is_followed(self, here):
        write(here, "a/a.txt")
        (here / "link").symlink_to("a")
        assert names("link") == ["a/a.txt"]
        assert names("l*/*.txt") == ["link/a.txt"]
        assert names("link/*.txt") == ["a.txt"]

    def test_a_link_to_a_missing_file_is_counted(self, here, caplog):
        write(here, "a.txt")
        (here / "broken.txt").symlink_to("nothing")
        assert names("*.txt") == ["a.txt"]
        assert "passed over: 1 unreadable ('broken.txt')" in caplog.text

    def test_a_folder_called_like_a_file_is_a_folder(self, here):
        write(here, "a.txt/b.txt", "c.txt")
        assert names("*.txt") == ["c.txt"]
        assert names("a.txt") == ["a.txt/b.txt"]

    def test_hard_links_are_one_document(self, here):
        write(here, "a.txt")
        os.link("a.txt", "b.txt")
        assert names(here) == [f"{here.name}/a.txt"]
        assert names("b.txt", "a.txt") == ["b.txt"]


class TestPassedOver:
    def test_each_reason_is_counted_with_its_first_names(self, here, caplog):
        write(here, "a.txt", *(f"{i}.csv" for i in range(5)), "x/data.json", "empty")
        (here / "empty").write_text("")
        with caplog.at_level(logging.WARNING):
            assert names(here) == [f"{here.name}/a.txt"]
        listed = ", ".join(repr(f"{here.name}/{i}.csv") for i in range(3))
        assert [record.getMessage() for record in caplog.records] == [
            f"text files read: 1; passed over: 5 CSV ({listed}, …), 1 empty ('{here.name}/empty'), "
            f"1 JSON ('{here.name}/x/data.json')"
        ]

    def test_nothing_else_is_an_error_that_says_why(self, here):
        write(here, "1.csv", "2.csv")
        assert message("*.csv").endswith("have some (passed over 2 CSV ('1.csv', '2.csv'))")

    def test_a_file_that_vanishes_before_it_is_read(self, here, caplog, monkeypatch):
        write(here, "a.txt", "b.txt")
        read_bytes = type(here).read_bytes

        def vanish(path):
            path.with_name("b.txt").unlink(missing_ok=True)
            return read_bytes(path)

        monkeypatch.setattr("pathlib.Path.read_bytes", vanish)
        assert names(here) == [f"{here.name}/a.txt"]
        assert f"passed over: 1 unreadable ('{here.name}/b.txt')" in caplog.text

    def test_a_folder_that_may_not_be_listed(self, here, caplog, monkeypatch):
        write(here, "a.txt", "theirs/b.txt")
        refuse(monkeypatch, "scandir", str(here / "theirs"))
        assert names(here) == [f"{here.name}/a.txt"]
        assert "passed over: 1 unreadable folder ('theirs')" in caplog.text

    @pytest.mark.parametrize(
        "files",
        [
            ("dataset_info.json", "state.json", "data-00000-of-00001.arrow"),
            ("dataset_info.json", "x-train.arrow"),
            ("dataset_dict.json", "train/dataset_info.json"),
        ],
    )
    def test_a_hugging_face_dataset_is_refused_or_passed_over(self, here, files, caplog):
        write(here, "a.txt", *(f"set/{file}" for file in (*files, "README.md")))
        for path in ("set", f"{here}/set"):
            assert message(path).startswith(f"paths={path!r} is a Hugging Face dataset folder, not plain text; convert")
        for path in (here, "**/*"):
            caplog.clear()
            assert len(names(path)) == 1
            assert "passed over: 1 Hugging Face dataset folder ('set')" in caplog.text


class TestWorkDirectories:
    def write_run(self, run):
        write(run, "run.json", "metrics.jsonl", "sample.txt", "checkpoints/5/a.txt")

    @pytest.mark.parametrize("pattern", ["", "/**/*.txt", "/**"])
    def test_a_run_inside_its_data_reads_the_same_again(self, here, pattern, caplog):
        """Whatever was in there at its first start, and whatever it has written since."""
        write(here / "data", "a.txt", "b/c.txt", "b/run/notes.txt")
        paths, run = [f"data{pattern}"], here / "data" / "b" / "run"
        first = load_corpus(paths, run)
        self.write_run(run)
        assert load_corpus(paths, run) == load_corpus(paths, "data/b/run") == load_corpus(paths) == first
        assert [document.name.removeprefix("data/") for document in first] == ["a.txt", "b/c.txt"]
        assert "passed over: 1 work directory of a run ('b/run')" in caplog.text

    def test_other_runs_are_left_out(self, here):
        write(here, "data/a.txt")
        for i in range(2):
            self.write_run(here / "data" / "runs" / str(i))
        assert names("data", workdir="data/runs/1") == ["data/a.txt"]
        assert names("data/*/*/*", "data") == ["data/a.txt"]

    def test_a_file_in_it_can_be_named(self, here):
        self.write_run(here / "run")
        assert names("run/sample.txt", workdir="run") == ["sample.txt"]

    def test_data_inside_the_work_directory_is_read(self, here):
        self.write_run(here / "run")
        write(here / "run", "data/a.txt")
        assert names("run/data", workdir="run") == ["data/a.txt"]

    @pytest.mark.parametrize("started", [False, True])
    def test_the_work_directory_itself_is_refused_at_once(self, here, started):
        write(here / "run", "a.txt")
        if started:
            self.write_run(here / "run")
        with pytest.raises(ConfigError) as error:
            load_corpus(["run"], "run")
        assert str(error.value) == (
            "paths='run' is the work directory of a run; name the folder of the text, or use another workdir"
        )
