"""Span corruption: T5's numbers, nothing lost, and an example is a function of its place in the stream."""

import itertools

import numpy as np
import pytest

from moe_jax.data import Bytes, Folder, Pairs, SpanCorruption, batches, evaluation_batches
from moe_jax.data.spans import Gapped, corrupt, segmented
from tests.texts import text_folder

L = 64
SENTINEL = Bytes.V


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> tuple[Gapped, Gapped]:
    text = text_folder(tmp_path_factory.mktemp("text"))
    return SpanCorruption().prepare(text, Bytes(), L, tmp_path_factory.mktemp("data"))


def take(n: int, *arguments, **options) -> list[Pairs]:
    return list(itertools.islice(batches(*arguments, **options), n))


def filled(source: list[int], target: list[int]) -> list[int]:
    """The text of a pair: every sentinel of the source replaced by what follows it in the target."""
    spans: dict[int, list[int]] = {}
    for token in target:
        if token >= SENTINEL:
            spans[token] = []
        else:
            spans[max(spans)].append(token)
    assert list(spans) == list(range(SENTINEL, SENTINEL + len(spans)))
    assert spans.pop(max(spans)) == []
    assert source[-1] == Bytes.bod
    return [t for token in source[:-1] for t in spans.get(token, [token])]


@pytest.mark.parametrize(("L", "raw", "target"), [(512, 568, 114), (64, 70, 14), (3, 2, 3)])
def test_t5s_lengths(L, raw, target):
    """512 tokens of source take 568 of text, and have 114 of target (T5's code; 0.15 left out, 3 at a time)."""
    objective = SpanCorruption()
    assert objective.lengths(L) == (raw, target)
    shapes = objective.shapes(Folder("text"), 8, L)
    assert (shapes.source_BM.shape, shapes.target_BL.shape) == ((8, L), (8, target))


def test_a_pair_by_hand(monkeypatch):
    """T5's example, `Thank you <X> me to your party <Y> week`: two gaps, and the third sentinel ends the target."""
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    tokens = np.arange(10, dtype=np.int32)
    cuts = iter([np.array([2, 4]), np.array([2, 2])])
    monkeypatch.setattr("moe_jax.data.spans.segmented", lambda *_: next(cuts))
    source, target = corrupt(tokens, 4, 2, 100, 50, np.random.default_rng(0))
    say = [*words, *[""] * 40, "<end>", *[""] * 49, "<X>", "<Y>", "<Z>"]
    assert [say[i] for i in source] == ["Thank", "you", "<X>", "me", "to", "your", "party", "<Y>", "<end>"]
    assert [say[i] for i in target] == ["<X>", "for", "inviting", "<Y>", "last", "week", "<Z>"]


def test_all_ways_to_cut_are_as_likely():
    """Five tokens in three parts: six ways, each a sixth of the time."""
    rng = np.random.default_rng(0)
    found, n = np.unique([segmented(5, 3, rng) for _ in range(3000)], axis=0, return_counts=True)
    assert found.tolist() == [[1, 1, 3], [1, 2, 2], [1, 3, 1], [2, 1, 2], [2, 2, 1], [3, 1, 1]]
    assert abs(n - 500).max() < 100  # five standard deviations
    assert segmented(7, 1, rng).tolist() == [7]


@pytest.mark.parametrize(("n", "density", "span"), [(568, 0.15, 3.0), (20, 0.5, 1.0), (9, 0.9, 1.0), (2, 0.15, 3.0)])
def test_the_spans_put_back_are_the_text(n, density, span):
    objective, rng = SpanCorruption(density, span), np.random.default_rng(1)
    tokens = rng.integers(0, 256, n).astype(np.int32)
    noise, spans = objective.left_out(n)
    assert abs(noise - n * density) <= 0.5 or n == 2
    for _ in range(20):
        source, target = corrupt(tokens, noise, spans, SENTINEL, Bytes.bod, rng)
        assert filled(source.tolist(), target.tolist()) == tokens.tolist()
        assert (len(source), len(target)) == (n - noise + spans + 1, noise + spans + 1)


def test_batches_are_windows_with_gaps(splits):
    """Sources at full length but for a domain's last window; targets one ahead of the tokens; sentinels count too."""
    train, held_out = splits
    windows = {
        tuple(window["tokens"][window["segments"] > 0].tolist())
        for window in map(train.windows.__getitem__, range(len(train)))
    }
    for batch in take(5, train, 16, seed=0):
        for source, segment, tokens, target, real, mask, _ in zip(*batch, strict=True):
            text = filled(source[segment > 0].tolist(), target[mask].tolist())
            assert tuple(text) in windows
            assert tokens[mask].tolist() == [Bytes.bod, *target[mask][:-1].tolist()]
            assert (mask == (real > 0)).all()
            assert not source[segment == 0].any()
            assert not tokens[~mask].any()
    _, length = SpanCorruption().lengths(L)
    assert batch.source_BM.shape == (16, L)
    assert batch.target_BL.shape == (16, length)
    assert train.bytes_per_token == pytest.approx(train.windows.bytes_per_token * 10 / length)
    assert len({train.fingerprint, held_out.fingerprint, train.windows.fingerprint}) == 3


@pytest.mark.law(9)
def test_an_example_depends_on_its_place_in_the_stream_only(splits):
    """Law 9: other gaps in every epoch; the same ones for any number of processes, from any start."""
    train, _ = splits
    B = 64
    n = 2 * len(train) // B + 2
    straight = take(n, train, B, seed=1)
    for start in (1, n - 1):
        (again,) = take(1, train, B, seed=1, start=start)
        assert all(np.array_equal(a, b) for a, b in zip(again, straight[start], strict=True))
    shares = [take(2, train, B, seed=1, start=n - 2, process=p, processes=4) for p in range(4)]
    for whole, *parts in zip(straight[n - 2 :], *shares, strict=True):
        for array, *pieces in zip(whole, *parts, strict=True):
            np.testing.assert_array_equal(array, np.concatenate(pieces))
    rows = np.concatenate([batch.source_BM for batch in straight])[: 2 * len(train)]
    assert len(np.unique(rows[: len(train)], axis=0)) > 0.9 * len(train)
    epochs = [set(map(tuple, epoch.tolist())) for epoch in np.split(rows, 2)]
    assert len(epochs[0] & epochs[1]) < 0.1 * len(train)


def test_evaluation_always_sees_the_same_gaps(splits):
    _, held_out = splits
    B = 32
    assert len(held_out) % B, "the last batch is not full"
    once, again = (list(evaluation_batches(held_out, B)) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    real = np.concatenate([batch.loss_mask_BL for batch in once])
    assert real.any(1).sum() == len(held_out)
    assert not once[-1].source_segment_BM[-1].any()
    few = np.concatenate([batch.source_BM for batch in evaluation_batches(held_out, 8, limit=16)])
    everything = {tuple(row) for batch in once for row in batch.source_BM.tolist()}
    assert all(tuple(row) in everything for row in few.tolist())


@pytest.mark.parametrize(
    ("fields", "L", "message"),
    [
        ({}, 2, "L=2 leaves no token .* make it at least 3"),
        ({"sentinels": 28}, 512, "L=512 have 28 spans; set sentinels to 29"),
    ],
)
def test_what_cannot_be_corrupted_is_refused(fields, L, message):
    with pytest.raises(ValueError, match=message):
        SpanCorruption(**fields).lengths(L)
