"""Text as people have it: what is left out is said, what is read is read once, and what cannot be read is one line."""

import os
import pathlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import (
    Bytes,
    Folder,
    Limited,
    NextToken,
    Parallel,
    SentencePiece,
    Translation,
    cache,
    folders,
    prepare,
)
from moe_jax.data import tokenizers as tokenizing
from moe_jax.data.documents import digest, is_held_out, pieces
from moe_jax.data.folders import BOM
from moe_jax.data.tokenizers import training_lines
from moe_jax.names import printable, without_middle


def put(root: pathlib.Path, **contents: bytes) -> None:
    """Writes files, named by path with `__` for a slash and `_` for a dot."""
    for name, content in contents.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def texts(source: Folder) -> set[bytes]:
    return {d.text for split in ("train", "held_out") for d in source.documents(split, pathlib.Path())}


# ---------------------------------------------------------------- what is left out


def test_files_without_text_are_counted_and_named(tmp_path, capsys):
    """One line on stderr, with the reason, the files, and the domains that have no text."""
    put(tmp_path, a__x_txt=b"a text", a__copy_txt=b"a text", a__empty_txt=b" \n", _git__config=b"\xff")
    put(tmp_path, utf16__x_txt="text".encode("utf-16"), utf16__y_txt="text".encode("utf-16-be"))
    put(tmp_path, a__latin1_txt="ein Ungl\u00fcck".encode("latin1"), a__long_txt=b"x" * 70_000 + b"\x80" + b"x" * 10)
    put(tmp_path, photo_jpg=b"\xff\xd8\xff\x00", a__nul_txt=b"a\0b", copies__x_txt=b"a text")
    assert Folder(str(tmp_path)).domains == ("a",)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"Folder(path={str(tmp_path)!r}): 6 of 9 files are left out: "
        "2 not in UTF-8 (a/latin1.txt at byte 8, a/long.txt at byte 70,000); "
        "3 with NUL bytes (a/nul.txt, photo.jpg, utf16/y.txt); 1 in UTF-16 (utf16/x.txt). "
        f"No domain is left of: copies, {tmp_path.name}, utf16."
    )


def test_files_that_cannot_be_read_are_named(tmp_path, capsys, monkeypatch):
    """Deleted since they were listed, not ours, no files at all; the rest is read. Any other error ends it."""
    put(tmp_path, a__gone_txt=b"1", a__mine_txt=b"2", a__other_txt=b"3")
    (tmp_path / "a" / "link.txt").symlink_to("nowhere")
    (tmp_path / "books").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "a" / "pipe")
    errors = {"gone.txt": FileNotFoundError, "other.txt": PermissionError}

    def opened(path, *arguments, **options):
        if error := errors.get(os.path.basename(path)):
            raise error(5, "words", path)
        return open(path, *arguments, **options)

    monkeypatch.setattr(folders, "open", opened, raising=False)
    assert texts(Folder(str(tmp_path))) == {b"2"}
    line = capsys.readouterr().err.splitlines()[0]
    assert "5 of 6 files are left out: 4 that cannot be read (a/gone.txt, a/link.txt, a/other.txt, a/pipe)" in line
    assert "1 that link to a folder (books)" in line
    errors["mine.txt"] = OSError
    with pytest.raises(OSError, match=r"mine\.txt"):
        Folder(str(tmp_path)).fingerprint(tmp_path)


def test_folders_that_cannot_be_read_are_named(tmp_path, capsys, monkeypatch):
    put(tmp_path, a__x_txt=b"text", b__y_txt=b"more")

    def scanned(path):
        if os.path.basename(path) == "b":
            raise PermissionError(13, "words", path)
        return scan(path)

    scan = os.scandir
    monkeypatch.setattr(folders.os, "scandir", scanned)
    assert Folder(str(tmp_path)).domains == ("a",)
    assert "1 that cannot be read (b/)" in capsys.readouterr().err


def test_nothing_is_said_where_nothing_is_left_out(tmp_path, capsys):
    put(tmp_path, a__x_txt=b"text", _hidden=b"\xff", a_tsv=b"a\tb\n")
    assert len(Folder(str(tmp_path)).domains) == 2
    assert Parallel(str(tmp_path)).domains == ("a",)
    assert capsys.readouterr().err == ""


def test_parallel_files_in_subfolders_are_named(tmp_path, capsys):
    put(tmp_path, a_tsv=b"a\tb\n", more__b_tsv=b"c\td\n", more__README=b"text")
    (tmp_path / "._a.tsv").write_bytes(b"\0what a desktop leaves there")
    assert Parallel(str(tmp_path)).domains == ("a",)
    assert "1 in a subfolder (more/b.tsv)" in capsys.readouterr().err


# ---------------------------------------------------------------- names


@pytest.fixture
def odd_names(tmp_path) -> pathlib.Path:
    root = tmp_path / "text"
    for name in (b"caf\xe9", "café".encode(), b"a\nb", b"$x^{$", b"text", b"b\\n", b"[x]"):
        os.makedirs(os.fsencode(root) + b"/" + name)
        with open(os.fsencode(root) + b"/" + name + b"/x.txt", "wb") as file:
            file.write(b"text of " + name.replace(b"\xe9", b"e"))
        with open(os.fsencode(root) + b"/" + name + b".tsv", "wb") as file:
            file.write(b"source\tof " + name.replace(b"\n", b" ").replace(b"\xe9", b"e") + b"\n")
    (root / "x.txt").write_text("text of the folder itself")
    return root


def test_domains_have_names_that_can_be_written(odd_names, tmp_path):
    """Bytes that are not UTF-8 and control characters by their escapes; all different, the folder's own as well."""
    windows, _ = prepare(Folder(str(odd_names)), Bytes(), 8, tmp_path / "data")
    others = ("$x^{$", "[x]", r"a\nb", r"b\\n", "caf\u00e9", r"caf\udce9", "text")
    assert windows.domains == Folder(str(odd_names)).domains
    assert sorted(windows.domains) == sorted([*others, "text/"])
    assert sorted(Parallel(str(odd_names)).domains) == sorted(others)
    assert "".join(windows.domains).encode().decode().isprintable()


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec=None), max_size=5), unique=True, max_size=4))
def test_printable_names_are_written_everywhere_and_stay_different(names):
    written = [printable(name) for name in names]
    assert len(set(written)) == len(names)
    assert "".join(written).encode().decode().splitlines() in ([], ["".join(written)])
    assert [printable(name) for name in ("prose", "日本　語", "a b")] == ["prose", "日本　語", "a b"]


def test_long_names_are_cut_in_the_middle():
    assert without_middle("abcdefghij", 10) == "abcdefghij"
    assert without_middle("abcdefghijk", 10) == "abcde…hijk"
    assert [len(without_middle("x" * 300, n)) for n in (10, 11)] == [10, 11]


# ---------------------------------------------------------------- byte-order marks and splits


def test_a_byte_order_mark_is_no_text(tmp_path):
    put(tmp_path, a_txt=BOM + b"one text", b_txt=b"one text", c_txt=b"another")
    assert texts(Folder(str(tmp_path))) == {b"one text", b"another"}
    lines = [b"a\tb", b"c\td", b"a\te"]
    put(tmp_path, a_tsv=BOM + b"\n".join(lines), b_tsv=BOM + b"\n".join([lines[1], BOM + lines[0], lines[2]]))
    pairs = {split: set(Parallel(str(tmp_path)).pairs(split, tmp_path)) for split in ("train", "held_out")}
    assert {pair.source for pair in pairs["train"] | pairs["held_out"]} == {b"a", b"c"}
    assert not {p.source for p in pairs["train"]} & {p.source for p in pairs["held_out"]}


def test_a_source_is_in_one_split_whatever_its_file(tmp_path):
    """The file of two sources must hold one of them out; the larger file, which has another to hold out, follows."""
    digests = {digest(b"%d" % i): b"%d" % i for i in range(40) if not is_held_out(digest(b"%d" % i))}
    first, second, third = (digests[key] for key in sorted(digests)[:3])
    put(tmp_path, small_tsv=b"%s\tx\n%s\tx\n" % (second, third))
    put(tmp_path, large_tsv=b"".join(b"%s\ty\n" % source for source in (first, second, third)))
    train, held = ({p.source for p in Parallel(str(tmp_path)).pairs(s, tmp_path)} for s in ("train", "held_out"))
    assert (train, held) == ({third}, {first, second})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tb\n".encode("utf-16"), r"a\.tsv is in UTF-16; convert the file to UTF-8"),
        (b"a\tb\nc\td\xff\n", r"a\.tsv, line 2 is not UTF-8; convert the file"),
    ],
)
def test_pairs_in_another_encoding_are_refused(tmp_path, content, message):
    put(tmp_path, a_tsv=content)
    with pytest.raises(ValueError, match=message):
        Parallel(str(tmp_path)).fingerprint(tmp_path)


@pytest.mark.parametrize("path", ["~nobody_of_this_name/text", "a\0b", "loop"])
@pytest.mark.parametrize("source", [Folder, Parallel])
def test_paths_that_lead_nowhere_are_one_line(tmp_path, monkeypatch, path, source):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("loop").symlink_to("loop")
    with pytest.raises(FileNotFoundError, match="there is no such folder, give one of"):
        source(path).fingerprint(tmp_path)


# ---------------------------------------------------------------- read once


class Meanwhile(Bytes):
    """Bytes, in whose training everything in a folder is changed."""

    def __init__(self, root: pathlib.Path):
        object.__setattr__(self, "root", root)

    def fit(self, texts, folder):
        for file in self.root.rglob("*.*"):
            file.write_bytes(b"other\ttext\n" * 3)
        put(self.root, new__file_txt=b"more", new_tsv=b"more\tmore\n")
        return Bytes()


@pytest.mark.parametrize("documents", [None, 8])
def test_a_folder_that_changes_meanwhile_gives_what_was_read_first(tmp_path, documents):
    """Fingerprint, domains and both splits are of one reading."""
    limited = lambda source: source if documents is None else Limited(source, documents)  # noqa: E731
    for root in (tmp_path / "kept" / "text", tmp_path / "changed" / "text"):
        put(root, **{f"{domain}__{i}_txt": b"%d" % i * (5 + i) for domain, i in [*zip("abab" * 3, range(12))]})  # noqa: B905
    kept = prepare(limited(Folder(str(tmp_path / "kept" / "text"))), Bytes(), 8, tmp_path / "1")
    root = tmp_path / "changed" / "text"
    changed = prepare(limited(Folder(str(root))), Meanwhile(root), 8, tmp_path / "2")
    for one, other in zip(kept, changed, strict=True):
        assert one.fingerprint == other.fingerprint
        assert one.domains == other.domains == ("a", "b")
        np.testing.assert_array_equal(one.tokens_WM, other.tokens_WM)


def test_pairs_that_change_meanwhile_are_those_that_were_read_first(tmp_path):
    lines = b"".join(b"source %d\ttarget %d\n" % (i, i) for i in range(9))
    for root in (tmp_path / "kept", tmp_path / "changed"):
        put(root, a_tsv=lines, b_tsv=lines[: len(lines) // 3])
    kept = Translation().prepare(Parallel(str(tmp_path / "kept")), Bytes(), 16, tmp_path / "1")
    root = tmp_path / "changed"
    changed = Translation().prepare(Parallel(str(root)), Meanwhile(root), 16, tmp_path / "2")
    for one, other in zip(kept, changed, strict=True):
        assert one.fingerprint == other.fingerprint
        assert one.domains == other.domains == ("a", "b")
        np.testing.assert_array_equal(one.source_WM, other.source_WM)


def test_every_file_is_opened_once(tmp_path, monkeypatch):
    opened = list[str]()
    monkeypatch.setattr(folders, "open", lambda p, *a, **k: (opened.append(p), open(p, *a, **k))[1], raising=False)
    put(tmp_path / "text", **{f"a__{i}_txt": b"%d" % i for i in range(20)})
    prepare(Folder(str(tmp_path / "text")), Bytes(), 8, tmp_path / "data")
    assert len(opened) == len(set(opened)) == 20


class Copied(str):
    """A text that counts the characters that are copied out of it, and out of what is copied."""

    def __getitem__(self, which):
        part = Copied(super().__getitem__(which))
        part.count = self.count
        self.count[0] += len(part)
        return part


@pytest.mark.parametrize("line", ["x" * 10_000, ("x" * 98 + "\n") * 100])
def test_pieces_copy_a_text_once(line):
    """A line of any length takes time in proportion to it."""
    text = Copied(line)
    text.count = [0]
    assert "".join(pieces(text, 64)) == line
    assert text.count[0] == len(line)


def test_a_line_of_fifty_megabytes_is_read_in_seconds(tmp_path):
    put(tmp_path, a_txt=b"0123456789 abcdef" * 3_000_000)
    began = time.process_time()
    assert len(Folder(str(tmp_path)).snapshot().splits["train"]) > 0
    assert time.process_time() - began < 4  # 0.1 s on one core; 10 s where every piece copies the rest


# ---------------------------------------------------------------- text for a tokenizer


def test_a_tokenizer_sees_the_first_bytes_of_its_text():
    """However long a document is: the one that reaches the limit is cut there, and none is read after it."""

    def documents(*several: bytes):
        yield from several
        pytest.fail("read too far")

    assert list(training_lines(documents(b"ab\ncd\nef\n"), 8)) == ["ab", "cd", "ef"[:2]]
    assert list(training_lines(documents(b"a\n", b"b\nc\nd\n"), 4)) == ["a", "b"]
    assert list(training_lines(documents(b"a\n", b"b\n"), 4)) == ["a", "b"]
    assert list(training_lines(documents("a\u00e9".encode()), 2)) == ["a"]
    assert list(training_lines([b"a\n", b"b"], 100)) == ["a", "b"]
    assert [len(line) for line in training_lines([b"x" * 2500], 2100)] == [1000, 1000, 100]


def test_sentencepiece_is_trained_on_a_long_first_document(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "TRAINED_ON", 2000)
    words = b"".join(b"word%d and another%d, %x\n" % (i % 7, i % 5, i * i) for i in range(200))
    assert SentencePiece(V=300).fit([words, b"short"], tmp_path).V == 300


# ---------------------------------------------------------------- places that cannot be


def never_read(*_):
    pytest.fail("the text was read first")


@pytest.mark.parametrize(("objective", "source"), [(NextToken(), Folder), (Translation(), Parallel)])
def test_a_place_that_cannot_be_made_is_refused_before_text_is_read(tmp_path, monkeypatch, objective, source):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(source, "snapshot", never_read)
    words = r"Prepared data cannot be kept in .*file.* \(a file is in its place\); choose another place, by --data_dir"
    for place in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(ValueError, match=words):
            objective.prepare(source(str(tmp_path)), Bytes(), 8, place)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system", "x")

    monkeypatch.setattr(cache.tempfile, "mkdtemp", refuse)
    with pytest.raises(ValueError, match=r"cannot be kept in .* \(Read-only file system\); choose another place"):
        cache.ensure(tmp_path / "made", never_read)


def test_a_place_whose_name_is_not_utf8_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be kept in .*/caf\\udce9 \(its name is not UTF-8\)"):
        prepare(Folder(str(tmp_path)), Bytes(), 8, tmp_path / "caf\udce9")


def test_nobody_without_a_home_is_asked_for_one(monkeypatch):
    def refuse():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MOE_JAX_DATA", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", refuse)
    with pytest.raises(ValueError, match=r"no home .*choose another place, by --data_dir or .*MOE_JAX_DATA"):
        cache.default_directory()
