"""Parallel texts become pairs of tokens; what is wrong with them is said; no held-out source is trained on."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe_jax.config import build
from moe_jax.data import (
    Bytes,
    Corpus,
    NextToken,
    Parallel,
    SentencePiece,
    SpanCorruption,
    TfdsPairs,
    ToyTranslation,
    Translation,
    batches,
    cache,
    evaluation_batches,
)
from moe_jax.data.tokenizers import TrainedSentencePiece
from moe_jax.data.translation import Pair, word_order
from tests.components.test_data import corrupt

TOY = ToyTranslation(languages=3, words=12, sentences=400)


@pytest.fixture
def folder(tmp_path) -> Parallel:
    """Thirty pairs of two languages, one of them twice, and a file of another kind."""
    root = tmp_path / "text"
    root.mkdir()
    for language, sign in (("en-de", "ä"), ("en-fr", "é")):
        lines = [f"number {i}\t{sign}{'x' * i}" for i in range(30)]
        (root / f"{language}.tsv").write_text("\n".join([*lines, lines[3], ""]))
    (root / "README").write_text("not a pair")
    return Parallel(str(root))


def texts(pairs) -> list[tuple[bytes, bytes]]:
    """The pairs of a split, as its batches have them."""
    found = []
    for batch in evaluation_batches(pairs, 4):
        for source, segment, tokens, target, real, mask, _ in zip(*batch, strict=True):
            assert (real > 0).tolist() == mask.tolist()
            if not mask.any():
                assert not any((source.any(), segment.any(), tokens.any(), target.any()))
                continue
            assert target[mask][-1] == tokens[0] == Bytes.bod
            assert target[mask][:-1].tolist() == tokens[mask][1:].tolist()
            found.append((Bytes().decode(source[segment > 0]), Bytes().decode(target[mask])))
    return found


def test_a_folder_gives_its_pairs_back(folder, tmp_path):
    """Every pair in one split, without duplicates; by domain, in fixed shapes, at all lengths that fit."""
    splits = Translation().prepare(folder, Bytes(), 40, tmp_path)
    train, held_out = map(texts, splits)
    lines = {(b"number %d" % i, sign.encode() + b"x" * i) for i in range(30) for sign in "äé"}
    assert sorted(train + held_out) == sorted(lines)
    assert not {source for source, _ in train} & {source for source, _ in held_out}
    assert splits[0].domains == splits[1].domains == ("en-de", "en-fr")
    for split, found in zip(splits, (train, held_out), strict=True):
        assert split.left_out == 0
        size = sum(len(target) for _, target in found)
        assert split.bytes_per_token == pytest.approx(size / (size + len(found)))  # and one that ends each
    (batch,) = evaluation_batches(splits[0], len(splits[0]))
    assert [a.shape[1:] for a in batch] == [(40,)] * 6 + [()]
    assert [a.shape for a in batch] == [s.shape for s in Translation().shapes(folder, len(splits[0]), 40)]
    for source, mask, domain in zip(batch.target_BL, batch.loss_mask_BL, batch.domain_B, strict=True):
        assert Bytes().decode(source[mask])[:2].decode() == "äé"[domain]


def test_a_batch_by_hand(tmp_path):
    (tmp_path / "a.tsv").write_text("ab\tc\nd\tef\n")
    train, held_out = Translation().prepare(Parallel(str(tmp_path)), Bytes(), 3, tmp_path)
    rows = sorted((train[0], held_out[0]), key=lambda row: row["source"][0])
    batch = train.batch([*rows, train.padding])
    assert batch.source_BM.tolist() == [[97, 98, 0], [100, 0, 0], [0, 0, 0]]
    assert batch.source_segment_BM.tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert batch.tokens_BL.tolist() == [[256, 99, 0], [256, 101, 102], [0, 0, 0]]
    assert batch.target_BL.tolist() == [[99, 256, 0], [101, 102, 256], [0, 0, 0]]
    assert batch.segment_BL.tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0]]
    assert batch.loss_mask_BL.tolist() == [[True, True, False], [True] * 3, [False] * 3]
    assert batch.domain_B.tolist() == [0, 0, 0]


def test_long_pairs_are_left_out_and_counted(folder, tmp_path, capsys):
    """Targets of at most 19 bytes and their end: 18 of 30 in each language, whose letter takes two."""
    splits = Translation().prepare(folder, Bytes(), 20, tmp_path)
    assert sum(map(len, splits)) == 36
    assert sum(split.left_out for split in splits) == 24
    assert max(len(target) for split in splits for _, target in texts(split)) == 19
    assert f"{splits[0].left_out} of {len(splits[0]) + splits[0].left_out} train pairs" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"of .* train pairs fit into L=2 tokens; give more pairs, or a larger L"):
        Translation().prepare(folder, Bytes(), 2, tmp_path)


def test_sources_may_have_a_tokenizer_of_their_own(tmp_path):
    objective = Translation(source=SentencePiece(V=300))
    assert objective.sizes(TOY, Bytes()) == {"V": 257, "V_source": 300}
    assert Translation().sizes(TOY, Bytes()) == {"V": 257, "V_source": None}
    _, held_out = objective.prepare(TOY, Bytes(), 20, tmp_path)
    (model,) = tmp_path.glob("tokenizers/*/sentencepiece.model")
    pieces, expected = TrainedSentencePiece(model.read_bytes()), list(TOY.pairs("held_out", tmp_path))
    for i, pair in enumerate(expected):
        row = held_out[i]
        assert pieces.decode(row["source"][row["source"] >= 0]) == pair.source
        assert Bytes().decode(row["target"][row["target"] >= 0]) == pair.target
    assert len(held_out) == len(expected)


def test_files_are_kept_keyed_and_checked(folder, tmp_path):
    first = Translation().prepare(folder, Bytes(), 40, tmp_path)
    again = Translation().prepare(folder, Bytes(), 40, tmp_path)
    assert [split.fingerprint for split in first] == [split.fingerprint for split in again]
    longer = Translation().prepare(folder, Bytes(), 41, tmp_path)
    assert len({split.fingerprint for split in (*first, *longer)}) == 4


@pytest.mark.parametrize("name", ["source.npy", "target.npy", "domains.npy", cache.MANIFEST])
def test_damaged_pairs_are_refused(folder, tmp_path, name):
    Translation().prepare(folder, Bytes(), 40, tmp_path)
    (path,) = tmp_path.glob(f"pairs/*/train/{name}")
    corrupt(path) if name != cache.MANIFEST else path.write_text("{")
    with pytest.raises(ValueError, match=rf"{name} is damaged or missing: delete the folder .*train"):
        Translation().prepare(folder, Bytes(), 40, tmp_path)


def test_batches_of_pairs_are_served_like_all_others(tmp_path):
    train, _ = Translation().prepare(TOY, Bytes(), 20, tmp_path)
    alone = next(batches(train, 8, seed=0, start=3))
    shares = [next(batches(train, 8, seed=0, start=3, process=p, processes=2)) for p in range(2)]
    for whole, *parts in zip(alone, *shares, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert len(set(alone.domain_B.tolist())) > 1


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"one text", "two texts with one tab"),
        (b"a\tb\tc", "two texts with one tab"),
        (b"a\t ", "two texts with one tab"),
        (b"", "two texts with one tab"),
        (b"a\t\xff", "is not UTF-8; convert the file"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "a.tsv").write_bytes(b"good\tline\r\n" + line + b"\nanother\tgood one")
    with pytest.raises(ValueError, match=rf"a\.tsv, line 2.*{message}"):
        Translation().prepare(Parallel(str(tmp_path)), Bytes(), 40, tmp_path)


def test_folders_without_pairs_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        Parallel(str(tmp_path / "missing")).fingerprint(tmp_path)
    with pytest.raises(ValueError, match=r"holds no \.tsv file: put some there"):
        Parallel(str(tmp_path)).fingerprint(tmp_path)


with tfds.core.registered.skip_registration():

    class TinyTranslation(tfds.core.GeneratorBasedBuilder):
        """Forty pairs of German and English, without a validation split; found by its files only."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            languages = tfds.features.Translation(languages=["de", "en"])
            return self.dataset_info_from_configs(features=languages)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(40):
                yield i, {"de": f"Zeile {i}" if i else "", "en": f"line {i}"}


def test_tfds_pairs(tmp_path):
    """A translation data set by name; examples without a text are left out; the rest is split by digest."""
    TinyTranslation(data_dir=tmp_path / "tfds").download_and_prepare(file_format="array_record")
    source = TfdsPairs("tiny_translation", source="de", target="en", data_dir=str(tmp_path / "tfds"))
    train, held = (list(source.pairs(split, tmp_path)) for split in ("train", "held_out"))
    assert {*train, *held} == {Pair(b"Zeile %d" % i, b"line %d" % i, 0) for i in range(1, 40)}
    assert len(train) + len(held) == 39
    assert train
    assert held
    assert source.domains == ("de-en",)
    assert len(source.fingerprint(tmp_path)) == 64
    wrong = TfdsPairs("tiny_translation", source="de", target="fr", data_dir=str(tmp_path / "tfds"))
    with pytest.raises(ValueError, match=r"has the texts \['de', 'en'\]: set source and target to two of them"):
        wrong.fingerprint(tmp_path)


def test_toy_languages_have_their_own_words_in_their_own_order(tmp_path):
    """A dictionary read off the training sentences translates the held-out ones; none of them was seen."""
    train, held = (list(TOY.pairs(split, tmp_path)) for split in ("train", "held_out"))
    assert (len(train) + len(held), {pair.domain for pair in held}) == (400, {0, 1, 2})
    few = ToyTranslation(languages=3, words=6, sentences=600)  # that each is said in several languages
    kept, apart = ({pair.source[2:] for pair in few.pairs(split, tmp_path)} for split in ("train", "held_out"))
    assert len(kept) + len(apart) < 580
    assert not kept & apart
    dictionary: dict[tuple[int, bytes], bytes] = {}

    def words(pair: Pair) -> list[bytes]:
        tag, *sentence = pair.source.split()
        assert int(tag) == pair.domain + 1
        return [sentence[i] for i in word_order(np.arange(len(sentence)), pair.domain + 1)]

    for pair in train:
        for word, other in zip(words(pair), pair.target.split(), strict=True):
            assert dictionary.setdefault((pair.domain, word), other) == other
    for pair in held:
        assert b" ".join(dictionary[pair.domain, word] for word in words(pair)) == pair.target
    assert [len({other for (z, _), other in dictionary.items() if z == domain}) for domain in range(3)] == [12] * 3
    same = sum(word == other for (_, word), other in dictionary.items())
    assert same <= 2, "languages differ in their words"


def test_toy_languages_reorder_words():
    assert [word_order(np.arange(4), z).tolist() for z in (1, 2, 3, 4)] == [
        [3, 2, 1, 0],
        [1, 2, 3, 0],
        [3, 2, 1, 0],
        [2, 3, 0, 1],
    ]


def test_toy_languages_are_the_same_everywhere(tmp_path):
    """The texts themselves are known: another numpy must not change them unseen."""
    first = next(TOY.pairs("train", tmp_path))
    assert first == Pair(b"2 ke xu ni do", b"ca vo tu ta", 1)
    assert TOY.fingerprint(tmp_path)[:16] == "26f537b86d774af4"


@pytest.mark.parametrize(
    ("objective", "source", "kind", "message"),
    [
        (Translation(), Corpus(), "EncoderDecoder", r"needs a source of pairs, which Corpus.*set.*to ToyTranslation"),
        (SpanCorruption(), TOY, "EncoderDecoder", r"needs a source of documents, which ToyTranslation.*Corpus\(\)"),
        (NextToken(), TOY, "LM", "needs a source of documents"),
        (SpanCorruption(), Corpus(), "LM", r"takes tokens.*makes pairs; use NextToken\(\)"),
    ],
    ids=str,
)
def test_objectives_and_sources_must_fit(objective, source, kind, message):
    """Said when the config is read."""
    model = {"kind": kind, "D": 8, "N": 1, "attention": "MHA(1, 8)", "moe_layers": "none"}
    with pytest.raises(ValueError, match=message):
        build({"model": model, "data": {"source": source, "objective": objective, "L": 8, "B": 8}})
