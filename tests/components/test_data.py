"""Text becomes windows without losing or inventing a byte, and every batch is a function of its number."""

import itertools
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import (
    Batch,
    Bytes,
    Corpus,
    Folder,
    SentencePiece,
    Tfds,
    Windows,
    batches,
    cache,
    evaluation_batches,
    prepare,
    python_text,
)
from moe_jax.data.batches import spread
from moe_jax.data.documents import digest, held_out, pieces
from moe_jax.data.packing import Packer
from moe_jax.data.tokenizers import TrainedSentencePiece
from moe_jax.data.windows import batch
from tests.texts import text_folder

L = 256
settings.register_profile("data", deadline=None)  # the first call of a function is slow where types are checked
settings.load_profile("data")
CORPUS = Corpus(megabytes=0.05)  # of this very Python; tests of what is made of text have text of their own


@pytest.fixture(scope="session")
def directory(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def own(tmp_path_factory) -> Folder:
    """Text that does not depend on this Python; every domain has more than three windows to hold out."""
    return text_folder(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def windows(own, directory) -> tuple[Windows, Windows]:
    train, held = prepare(own, Bytes(), L, directory)
    assert min(np.bincount(held.domain_W, minlength=8)) > 3
    return train, held


@pytest.fixture(scope="session")
def pieces_tokenizer(own, directory) -> TrainedSentencePiece:
    texts = (document.text for document in own.documents("train", directory))
    return SentencePiece(V=600).fit(texts, directory / "sentencepiece")


@pytest.fixture
def folder(tmp_path) -> Folder:
    """Two domains of ten documents, and things that are not text."""
    root = tmp_path / "text"
    for domain, i in itertools.product(("cooking", "sailing"), range(10)):
        (root / domain).mkdir(parents=True, exist_ok=True)
        (root / domain / f"{i}.txt").write_text(f"{domain} number {i}, on {i * i} pages\n" * (i + 1))
    (root / "yachts").mkdir()
    (root / "yachts" / "copy.txt").write_bytes((root / "sailing" / "3.txt").read_bytes())
    (root / "sailing" / "photo.jpg").write_bytes(b"\xff\xd8\xff\x00")
    return Folder(str(root))


def corrupt(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


def stack(parts: list[Batch]) -> Batch:
    return Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def same(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# the embedded corpus


def test_corpus_has_eight_domains_in_both_splits_and_keeps_to_its_size(directory):
    train, held = (list(CORPUS.documents(split, directory)) for split in ("train", "held_out"))
    assert len(CORPUS.domains) == 8
    assert {d.domain for d in train} == {d.domain for d in held} == set(range(8))
    for number, domain in enumerate(CORPUS.domains):
        size = sum(len(d.text) for d in train + held if d.domain == number)
        assert size <= 0.05e6, domain
        assert size > 0.02e6, f"this Python and its packages have only {size} bytes of {domain}"


def test_corpus_documents_are_distinct_and_held_out_ones_are_not_trained_on(directory):
    train, held = ([d.text for d in CORPUS.documents(split, directory)] for split in ("train", "held_out"))
    assert len(set(train + held)) == len(train + held)
    assert 0.01 < len(held) / len(train + held) < 0.2


def test_corpus_built_again_is_the_same(directory, tmp_path):
    python_text.files.cache_clear()
    assert CORPUS.fingerprint(tmp_path) == CORPUS.fingerprint(directory)
    assert list(CORPUS.documents("held_out", tmp_path)) == list(CORPUS.documents("held_out", directory))


def test_corpus_of_another_environment_is_not_used(directory, monkeypatch):
    here = CORPUS.prepared(directory)
    monkeypatch.setattr(python_text, "distributions", lambda: [])
    assert python_text.environment() not in here.name
    monkeypatch.setattr(Corpus, "_build", lambda *_: pytest.fail("built"))
    with pytest.raises(pytest.fail.Exception, match="built"):
        CORPUS.documents("train", directory).__next__()


def test_corpus_takes_no_file_twice_and_nothing_of_this_package():
    names = [name for files in python_text.files().values() for name, _ in files if not name.endswith(".txt")]
    assert len(names) == len(set(names))
    assert not [name for name in names if "moe_jax" in name or name.endswith((".pyc", "RECORD", "INSTALLER"))]


def test_corpus_damage_is_found(tmp_path):
    (shard,) = Corpus(0.02).prepared(tmp_path).rglob("*train.array_record*")
    corrupt(shard)
    with pytest.raises(ValueError, match=r"array_record.* is damaged or missing: delete the folder"):
        list(Corpus(0.02).documents("train", tmp_path))


def test_corpus_records_are_checked_against_their_fingerprint(tmp_path):
    manifest = Corpus(0.02).prepared(tmp_path) / cache.MANIFEST
    facts = json.loads(manifest.read_text())
    facts["facts"]["train"]["sha256"] = "0"
    manifest.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="does not read back as it was written"):
        list(Corpus(0.02).documents("train", tmp_path))


def test_near_copies_of_a_licence_are_one_document(tmp_path, monkeypatch):
    end = "Permission is hereby granted, free of charge, to any person. " * 10
    for i in range(3):
        (tmp_path / str(i)).write_text(f"Copyright holder {i}\n{end}")
    files = {"prose": [(f"{i}/LICENSE", str(tmp_path / str(i))) for i in range(3)]}
    monkeypatch.setattr(python_text, "files", lambda: files)
    assert [text.name for text in python_text.texts("prose", 1.0)] == ["0/LICENSE"]


@pytest.mark.parametrize(
    ("name", "domains"),
    [
        ("stdlib/json/decoder.py", ("prose",)),
        ("stdlib/test/test_json.py", ("tests",)),
        ("packages/jax/_src/core.py", ("library",)),
        ("packages/jax/_src/third_party/scipy/linalg.py", ()),
        ("packages/numpy/__init__.pyi", ("stubs",)),
        ("packages/numpy/_core/include/numpy/ndarraytypes.h", ("c",)),
        ("packages/a-1.dist-info/top_level.txt", ()),
        ("packages/a-1.dist-info/licenses/LICENSE.txt", ("prose",)),
        ("packages/a/b.so", ()),
    ],
)
def test_domain_of_a_file(name, domains):
    found = python_text.domains_of(pathlib.PurePosixPath(name))
    assert found == domains or set(found) | set(domains) <= {"prose", "stdlib", "library"}


def test_docstrings_are_text_without_code():
    source = '"""One."""\nclass A:\n    def f():\n        """Two.\n\n          more"""\n        return 3\n'
    assert python_text.docstrings(source) == "One.\n\nTwo.\n\nmore\n"
    assert python_text.docstrings("def f(:\n") is None


# folders and TFDS


@given(st.sets(st.text("abcdef", min_size=8, max_size=8), min_size=2))
def test_held_out_is_some_but_not_all(names):
    digests = [digest(name.encode()) for name in names]
    assert 0 < len(held_out(digests)) < len(digests)
    assert max(held_out(digests)) < min(set(digests) - held_out(digests))


@given(st.text("ab\n", max_size=60), st.integers(1, 9))
def test_pieces_are_short_and_lose_nothing(text, limit):
    cut = list(pieces(text, limit))
    assert "".join(cut) == text
    assert all(0 < len(piece) <= limit for piece in cut)


def test_folder_splits_each_domain_and_drops_copies(folder, tmp_path):
    train, held = (list(folder.documents(split, tmp_path)) for split in ("train", "held_out"))
    assert folder.domains == ("cooking", "sailing")
    assert {d.domain for d in train} == {d.domain for d in held} == {0, 1}
    assert len({d.text for d in train + held}) == len(train + held) == 20
    assert all(folder.domains[d.domain].encode() in d.text for d in train + held)


def test_folder_fingerprint_follows_content(folder, tmp_path):
    before = folder.fingerprint(tmp_path)
    assert folder.fingerprint(tmp_path) == before
    (pathlib.Path(folder.path) / "sailing" / "3.txt").write_text("changed")
    assert folder.fingerprint(tmp_path) != before


def test_flat_folder_is_one_domain(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.md").write_text(f"text {i}")
    assert Folder(str(tmp_path)).domains == (tmp_path.name,)


@pytest.mark.parametrize("files", [{}, {"a.bin": b"\xff\xfe\x00"}, {"empty.txt": b"\n"}, {".hidden": b"text"}])
def test_folder_without_text_is_refused(tmp_path, files):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.* holds no UTF-8 text file: put some there"):
        prepare(Folder(str(tmp_path)), Bytes(), L, tmp_path / "cache")


def test_missing_folder_and_single_document_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        Folder(str(tmp_path / "missing")).fingerprint(tmp_path)
    (tmp_path / "only.txt").write_text("one document")
    with pytest.raises(ValueError, match="no text in its held_out split: give it more documents"):
        prepare(Folder(str(tmp_path)), Bytes(), L, tmp_path / "cache")


with tfds.core.registered.skip_registration():

    class TinyText(tfds.core.GeneratorBasedBuilder):
        """A hundred lines of text, with a test split of four; found by its files only."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"line": tfds.features.Text(), "number": tfds.features.Scalar(np.int64)}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0, 100), "test": self._generate_examples(100, 104)}

        def _generate_examples(self, start, stop):
            for i in range(start, stop):
                yield i, {"line": f"line {i}", "number": i}


class NeedsTensorflow(tfds.core.GeneratorBasedBuilder):
    """A data set that reads its source with TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        import tensorflow as tf

        yield 0, {"text": tf.io.gfile.GFile("text").read()}


@pytest.fixture(scope="session")
def tfds_directory(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tfds")
    TinyText(data_dir=folder).download_and_prepare(file_format="array_record")
    return str(folder)


def test_tfds_reads_a_prepared_data_set_by_name(tfds_directory, tmp_path):
    source = Tfds("tiny_text", text="line", held_out="test", data_dir=tfds_directory)
    assert {d.text for d in source.documents("train", tmp_path)} == {b"line %d" % i for i in range(100)}
    assert {d.text for d in source.documents("held_out", tmp_path)} == {b"line %d" % i for i in range(100, 104)}
    train, held = prepare(source, Bytes(), 16, tmp_path)
    assert (train.domains, len(held)) == (("tiny_text",), 3)  # 4 lines of 1 + 8 tokens: 35 after the first


def test_tfds_without_a_held_out_split_shares_its_training_split(tfds_directory, tmp_path):
    source = Tfds("tiny_text", text="line", data_dir=tfds_directory)
    train, held = ({d.text for d in source.documents(split, tmp_path)} for split in ("train", "held_out"))
    assert train | held == {b"line %d" % i for i in range(100)}
    assert held
    assert not train & held


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Tfds("no_such_data"), "TFDS knows no such data set"),
        (Tfds("not a name!"), "Parsing builder name string"),
        (Tfds("tiny_text", text="lines"), "has the features .*'line', 'number'.*: set text to one"),
        (Tfds("tiny_text", text="number"), "set text to one that holds text"),
        (Tfds("needs_tensorflow"), r"needs TensorFlow to be prepared: pip install moe_jax\[tensorflow\]"),
    ],
)
def test_tfds_mistakes_are_one_line(source, message, tfds_directory, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    source = Tfds(source.name, source.text, data_dir=tfds_directory)
    with pytest.raises(ValueError, match=message) as caught:
        source.fingerprint(tmp_path)
    assert "\n" not in str(caught.value)


def cut(share: float):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("*train.array_record*", cut(0)),
        ("*train.array_record*", cut(0.3)),
        ("*train.array_record*", cut(0.5)),  # a whole block, in which all records read as empty
        ("*train.array_record*", cut(0.99)),
        ("*train.array_record*", pathlib.Path.unlink),
        ("dataset_info.json", cut(0.5)),
        ("features.json", cut(0)),
        ("features.json", lambda path: path.write_text("null")),
    ],
)
def test_a_damaged_data_set_is_one_line(file, damage, tfds_directory, tmp_path):
    shutil.copytree(tfds_directory, tmp_path, dirs_exist_ok=True)
    source = Tfds("tiny_text", text="line", held_out="test", data_dir=str(tmp_path))
    (path,) = tmp_path.rglob(file)
    damage(path)
    with pytest.raises(ValueError, match=r"Tfds\(name='tiny_text'.*") as caught:
        list(source.documents("train", tmp_path))
    assert "\n" not in str(caught.value)
    if "record" in file:
        assert "its files are damaged" in str(caught.value)
        assert "prepare the data set again" in str(caught.value)


# tokenizers


@given(st.binary(max_size=40))
def test_bytes_round_trip(text):
    ids = Bytes().encode(text)
    assert ids.dtype == np.int32
    assert Bytes().decode([Bytes().bod, *ids]) == text


@given(st.one_of(st.text(max_size=30).map(lambda text: text.encode("utf-8", "ignore")), st.binary(max_size=20)))
def test_sentencepiece_round_trip(pieces_tokenizer, text):
    ids = pieces_tokenizer.encode(text)
    assert pieces_tokenizer.decode(ids) == text
    assert all(0 <= i < pieces_tokenizer.V and i != pieces_tokenizer.bod for i in ids)


@pytest.mark.parametrize("text", ["  a\n\n\tb \r\n", "\u2581 x", "<s></s><unk><0x41>", "\0\u00a0\u3000 漢字"])
def test_sentencepiece_changes_nothing_on_the_way(pieces_tokenizer, text):
    ids = pieces_tokenizer.encode(text.encode())
    assert pieces_tokenizer.decode([pieces_tokenizer.bod, *ids]) == text.encode()


def test_sentencepiece_is_trained_once_and_the_same_again(pieces_tokenizer, own, directory, tmp_path):
    assert SentencePiece(V=600).fit([], directory / "sentencepiece").fingerprint == pieces_tokenizer.fingerprint
    texts = (document.text for document in own.documents("train", directory))
    again = SentencePiece(V=600).fit(texts, tmp_path / "again")
    assert (again.fingerprint, again.V) == (pieces_tokenizer.fingerprint, 600)
    corrupt(tmp_path / "again" / "sentencepiece.model")
    with pytest.raises(ValueError, match="damaged"):
        SentencePiece(V=600).fit([], tmp_path / "again")


def test_sentencepiece_with_too_large_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"SentencePiece\(V=9000\) cannot be trained on this text: .*too high"):
        SentencePiece(V=9000).fit([b"a short text"], tmp_path / "model")
    with pytest.raises(ValueError, match=r"SentencePiece\(V=\d+\) must be a whole number in \[300, 2\*\*31\)"):
        SentencePiece(V=256)


# windows


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1, max_size=6), st.integers(1, 7))
def test_windows_hold_every_token_as_a_target_once(documents, length):
    packer = Packer(length, bod=99)
    cuts = []
    for i, document in enumerate(documents):
        packer.add(np.array(document, np.int32))
        cuts += [packer.cut()] if i % 2 else []  # taking windows out early changes nothing
    cuts.append(packer.cut(last=True))
    tokens_WM, segment_WM = (np.concatenate(arrays) for arrays in zip(*cuts, strict=True))
    assert tokens_WM.shape[1] == length + 1
    assert np.array_equal(tokens_WM[1:, 0], tokens_WM[:-1, -1])
    stream = [99, *tokens_WM[:, 1:][segment_WM[:, 1:] > 0]]
    assert stream == [token for document in documents for token in [99, *document]]
    rows = zip(tokens_WM, segment_WM, strict=True)
    one = batch([{"tokens": t, "segments": s, "domain": np.array(0, np.int32)} for t, s in rows])
    assert one.target_BL[one.loss_mask_BL].tolist() == [token for document in documents for token in document]


def test_a_batch_by_hand():
    packer = Packer(4, bod=9)
    for document in ([1, 2], [3], [4, 5, 6]):
        packer.add(np.array(document, np.int32))
    tokens_WM, segment_WM = packer.cut(last=True)
    assert tokens_WM.tolist() == [[9, 1, 2, 9, 3], [3, 9, 4, 5, 6]]
    assert segment_WM.tolist() == [[1, 1, 1, 2, 2], [1, 2, 2, 2, 2]]
    packer = Packer(6, bod=9)
    packer.add(np.array([1, 2], np.int32))
    packer.add(np.array([3], np.int32))
    (tokens_M,), (segment_M,) = packer.cut(last=True)
    (row,) = zip(*batch([{"tokens": tokens_M, "segments": segment_M, "domain": np.array(5, np.int32)}]), strict=True)
    tokens, target, segment, position, mask, domain = (array.tolist() for array in row)
    assert tokens == [9, 1, 2, 9, 3, 0]
    assert target == [1, 2, 9, 3, 0, 0]
    assert segment == [1, 1, 1, 2, 2, 0]
    assert position == [0, 1, 2, 0, 1, 0]
    assert mask == [True, True, False, True, False, False]
    assert domain == 5


@pytest.mark.parametrize("tokenizer", [Bytes(), SentencePiece(V=600)])
def test_windows_give_the_documents_back(tokenizer, own, directory):
    for split, packed in zip(("train", "held_out"), prepare(own, tokenizer, L, directory), strict=True):
        found: list[list[bytes]] = [[] for _ in packed.domains]
        ids: list[list[int]] = [[] for _ in packed.domains]
        for i in range(len(packed)):
            window = packed[i]
            ids[window["domain"]] += window["tokens"][1:][window["segments"][1:] > 0].tolist()
        for domain, stream in enumerate(ids):
            ends = [i for i, token in enumerate(stream) if token == packed.tokenizer.bod] + [len(stream)]
            starts = [0, *(end + 1 for end in ends[:-1])]
            found[domain] = [packed.tokenizer.decode(stream[a:b]) for a, b in zip(starts, ends, strict=True)]
        expected = list(own.documents(split, directory))
        for domain in range(8):
            assert found[domain] == [d.text for d in expected if d.domain == domain]
        # bits per byte = bits per target / bytes per target
        targets = sum(part.loss_mask_BL.sum() for part in evaluation_batches(packed, 8))
        assert packed.bytes_per_token * targets == pytest.approx(sum(len(d.text) for d in expected))
    assert (packed.bytes_per_token == 1.0) == (tokenizer == Bytes())


def test_windows_are_kept_and_keyed(windows, own, directory, monkeypatch):
    monkeypatch.setattr("moe_jax.data.windows.write_windows", lambda *_: pytest.fail("written again"))
    train, held = prepare(own, Bytes(), L, directory)
    assert train.fingerprint == windows[0].fingerprint != held.fingerprint
    with pytest.raises(pytest.fail.Exception, match="written again"):
        prepare(own, Bytes(), L + 1, directory)


@pytest.mark.parametrize("name", ["tokens.npy", "segments.npy", "domains.npy", cache.MANIFEST])
def test_damaged_windows_are_refused(folder, tmp_path, name):
    prepare(folder, Bytes(), 16, tmp_path)
    (path,) = tmp_path.glob(f"windows/*/train/{name}")
    corrupt(path) if name != cache.MANIFEST else path.write_text("{")
    with pytest.raises(ValueError, match=rf"{name} is damaged or missing: delete the folder .*train") as caught:
        prepare(folder, Bytes(), 16, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_half_made_is_never_seen(tmp_path):
    def fail(unfinished):
        (unfinished / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.ensure(tmp_path / "made", fail)
    assert list(tmp_path.iterdir()) == []

    def make_slowly(unfinished):
        cache.ensure(tmp_path / "made", lambda _: {"by": "another process"})
        return {"by": "this one"}

    cache.ensure(tmp_path / "made", make_slowly)
    assert cache.read_facts(tmp_path / "made") == {"by": "another process"}


def test_default_directory(monkeypatch):
    monkeypatch.setenv("MOE_JAX_DATA", "/somewhere")
    assert cache.default_directory() == pathlib.Path("/somewhere")
    monkeypatch.delenv("MOE_JAX_DATA")
    assert cache.default_directory() == pathlib.Path.home() / ".cache" / "moe_jax"


# batches


def take(n: int, *arguments, **options) -> list[Batch]:
    return list(itertools.islice(batches(*arguments, **options), n))


@pytest.mark.law(9)
def test_batch_n_is_the_same_from_any_start_and_only_for_its_seed(windows):
    train, _ = windows
    n = 2 * len(train) // 64 + 3  # into a third epoch
    straight = take(n, train, 64, seed=1)
    for start in (0, 1, len(train) // 64, n - 1):
        assert same(straight[start], take(1, train, 64, seed=1, start=start)[0])
    assert not same(straight[0], take(1, train, 64, seed=2)[0])
    assert not same(straight[0], straight[1])


@pytest.mark.law(9)
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batches(windows, processes):
    alone = take(5, windows[0], 8, seed=3, start=2)
    shares = [take(5, windows[0], 8, seed=3, start=2, process=p, processes=processes) for p in range(processes)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert same(whole, stack(parts))


def test_every_window_once_per_epoch_and_each_epoch_in_another_order(folder, tmp_path):
    train, _ = prepare(folder, Bytes(), 16, tmp_path)
    rows = stack(take(3 * len(train), train, 1, seed=0)).tokens_BL.reshape(3, len(train), 16)
    epochs = [sorted(epoch.tolist()) for epoch in rows]
    in_order = sorted(stack(list(evaluation_batches(train, 1))).tokens_BL.tolist())
    assert epochs == [in_order] * 3
    assert not np.array_equal(rows[0], rows[1])


def test_batches_mix_domains(windows):
    distinct = [len(set(part.domain_B.tolist())) for part in take(40, windows[0], 8, seed=0)]
    assert np.mean(distinct) > 4  # 5.25 if domains were drawn evenly


def test_batches_have_their_types(windows):
    (one,) = take(1, windows[0], 4, seed=0)
    assert [array.shape for array in one] == [(4, L)] * 5 + [(4,)]
    assert [array.dtype for array in one] == [np.int32] * 4 + [np.bool_, np.int32]


@pytest.mark.law(7)
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_goes_through_all_windows_and_pads_the_last_batch(windows, processes):
    _, held = windows
    B = 2 * (len(held) // 4 + 1)  # does not divide
    shares = [list(evaluation_batches(held, B, process=p, processes=processes)) for p in range(processes)]
    everything = stack([stack(list(parts)) for parts in zip(*shares, strict=True)])
    assert len(everything.domain_B) == 2 * B > len(held)
    assert sorted(everything.tokens_BL[: len(held)].tolist()) == sorted(held.tokens_WM[:, :-1].tolist())
    assert all(len(set(part.domain_B.tolist())) > 1 for part in shares[0]), "domains are mixed"
    assert not everything.segment_BL[len(held) :].any()
    assert not everything.loss_mask_BL[len(held) :].any()


def test_evaluation_limit_is_spread_over_domains(windows):
    _, held = windows
    parts = stack(list(evaluation_batches(held, 8, limit=24)))
    assert np.bincount(parts.domain_B, minlength=8).tolist() == [3] * 8
    domain_W = np.array([0] * 10 + [1] * 2 + [2] * 10)
    assert spread(domain_W, 8).tolist() == [0, 3, 6, 10, 11, 12, 15, 18]
    assert spread(domain_W, 100).tolist() == list(range(22))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(B=6, processes=4), "B=6 cannot be shared by 4 processes"),
        (dict(B=10**6), "a batch of B=1000000 needs as many windows"),
        (dict(B=4, seed=-1), "seed must be in"),
        (dict(B=4, start=-1), "start at least 0"),
        (dict(B=4, process=1), "number the processes from 0"),
    ],
)
def test_wrong_batches_are_refused_at_once(windows, options, message):
    with pytest.raises(ValueError, match=message):
        batches(windows[0], **{"seed": 0, **options})
    if "processes" in options:
        with pytest.raises(ValueError, match=message):
            evaluation_batches(windows[0], **options)
