"""Which files become documents, and on which side of the split each ends."""

import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.checks import ConfigError
from moejax.data import Document, load_corpus, split_documents
from moejax.data.corpora import hash_documents


def write(folder, **texts):
    for name, text in texts.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.fixture
def books(tmp_path):
    return write(tmp_path / "books", b="bee\r\n", a="ä\n", deep__c="see\n", binary=b"x\0y", latin=b"\xe4", empty="")


def load(*paths):
    return [(document.name, document.text) for document in load_corpus([str(path) for path in paths])]


class TestLoadCorpus:
    def test_default_is_standard_library_without_tests(self):
        documents = load_corpus()
        names = [document.name for document in documents]
        assert {"argparse.py", "json/decoder.py"} <= set(names)
        assert names == sorted(names)
        assert not any({"test", "tests", "idle_test", "site-packages"} & set(name.split("/")) for name in names)
        assert sum(len(document.text) for document in documents) > 5_000_000

    def test_folder_is_read_recursively_and_exactly(self, books):
        assert load(books) == [("books/a", "ä\n"), ("books/b", "bee\r\n"), ("books/deep/c", "see\n")]

    def test_hidden_files_and_folders_are_left_out(self, books):
        before = load(books)
        (books / ".git").mkdir()
        (books / ".git" / "config").write_text("hidden")
        (books / ".hidden").write_text("hidden")
        assert load(books) == before

    def test_glob(self, books):
        assert load(books / "[ab]") == [("a", "ä\n"), ("b", "bee\r\n")]
        assert load(books / "**" / "c") == [("deep/c", "see\n")]

    def test_names_do_not_depend_on_where_the_corpus_is(self, books, tmp_path):
        before = load(books)
        moved = tmp_path / "elsewhere" / "books"
        moved.parent.mkdir()
        books.rename(moved)
        assert load(moved) == before

    def test_file(self, books):
        assert load(books / "a") == [("a", "ä\n")]

    def test_home(self, books, monkeypatch):
        monkeypatch.setenv("HOME", str(books))
        assert load("~/a") == load("~/[a]") == [("a", "ä\n")]

    def test_file_reached_twice_is_read_once(self, books):
        (books / "link").symlink_to(books / "a")
        assert load(books / "a", books) == [("a", "ä\n"), ("books/b", "bee\r\n"), ("books/deep/c", "see\n")]

    def test_passed_over_files_are_counted_in_one_line(self, books, caplog):
        with caplog.at_level(logging.WARNING):
            load(books)
        assert [record.getMessage() for record in caplog.records] == [
            "text files read: 3; "
            "passed over: 1 binary ('books/binary'), 1 empty ('books/empty'), 1 not UTF-8 ('books/latin')"
        ]

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("binary", "is binary (it has a NUL byte); name a non-empty UTF-8 text file"),
            ("latin", "is not UTF-8 (byte 0); name a non-empty UTF-8 text file"),
            ("empty", "is empty; name a non-empty UTF-8 text file"),
            ("missing", "does not exist; name a text file, a folder or a glob"),
            ("no*", "matches no file; name a text file, a folder or a glob that matches some"),
            ("dee*", "matches no file; name a text file, a folder or a glob that matches some"),
        ],
    )
    def test_error_of_path(self, books, name, reason):
        for paths in [(books / name,), (books, books / name)]:
            with pytest.raises(ConfigError) as error:
                load(*paths)
            assert str(error.value) == f"paths={str(books / name)!r} {reason}"

    def test_error_of_unreadable_file(self, books, monkeypatch):
        def refuse(path):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
        with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied\); name a non-empty UTF-8"):
            load(books / "a")

    def test_error_of_no_text(self, tmp_path):
        write(tmp_path, binary=b"\0")
        with pytest.raises(ConfigError, match=rf"^paths=\('{re.escape(str(tmp_path))}',\) hold no text; name UTF-8"):
            load(tmp_path)


def documents_of(names):
    return [Document(name, f"text of {name}\n") for name in names]


names = st.lists(st.text(min_size=1), unique=True, min_size=2, max_size=12)
fractions = st.floats(0.001, 0.999)


class TestSplitDocuments:
    @given(names, fractions)
    def test_disjoint_complete_and_not_empty(self, names, fraction):
        documents = documents_of(names)
        train, held_out = split_documents(documents, fraction)
        assert train
        assert held_out
        assert sorted(train + held_out, key=documents.index) == documents
        assert list(train) == [document for document in documents if document in train]

    def test_file_keeps_its_side_when_others_come(self):
        few, many = documents_of(f"f{i}" for i in range(100)), documents_of(f"f{i}" for i in range(300))
        train, held_out = split_documents(few, 0.2)
        more_train, more_held_out = split_documents(many[::-1], 0.2)
        assert set(train) < set(more_train)
        assert set(held_out) < set(more_held_out)
        assert 30 < len(more_held_out) < 90

    def test_same_in_every_process(self):
        _, held_out = split_documents(documents_of("abcdefghij"), 0.3)
        assert "".join(document.name for document in held_out) == "achij"

    def test_equal_names_and_texts_stay_apart(self):
        train, held_out = split_documents([Document("x", "same")] * 2, 0.5)
        assert len(train) == len(held_out) == 1

    @given(st.text(min_size=2), fractions)
    def test_single_document_is_cut(self, text, fraction):
        (train,), (held_out,) = split_documents([Document("x", text)], fraction)
        assert train.text + held_out.text == text
        assert train.text
        assert held_out.text

    def test_single_document_is_cut_at_a_line(self):
        (train,), (held_out,) = split_documents([Document("x", "one\ntwo\nthree\n")], 0.05)
        assert (train.text, held_out.text) == ("one\ntwo\n", "three\n")

    def test_single_document_of_long_lines_is_cut_within_one(self):
        (train,), _ = split_documents([Document("x", "a\n" + "b" * 98)], 0.1)
        assert len(train.text) == 90

    def test_errors(self):
        with pytest.raises(ConfigError, match=r"documents=\(\) cannot be split; at least one document is needed"):
            split_documents([], 0.1)
        with pytest.raises(ConfigError, match="document 'x' of 1 character is too short to split; 2 are needed"):
            split_documents([Document("x", "a")], 0.1)


def test_hash_sees_text_order_and_bounds():
    def hashed(*texts):
        return hash_documents([Document("x", text) for text in texts])

    assert len({hashed("ab", "c"), hashed("a", "bc"), hashed("c", "ab"), hashed("abc")}) == 4
    assert hashed("ab") == hash_documents([Document("y", "ab")])
