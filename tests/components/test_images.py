"""Images with their classes: fixed splits, batches that say what is padding, and what is refused in one line."""

import dataclasses
import gzip
import importlib.util
import io
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from configs import vmoe_nano
from experiments.vision.capacity import look
from moe_jax.config import build
from moe_jax.data import Bytes, Classification, Corpus, Digits, TfdsImages, batches, evaluation_batches, images
from moe_jax.data.batches import Examples
from moe_jax.data.images import ImageSplit, Labelled, scaled
from moe_jax.dispatch import Scatter
from moe_jax.step import State


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[ImageSplit, ImageSplit]:
    return Classification().prepare(Digits(), Bytes(), 1, tmp_path_factory.mktemp("data"))


# ---------------------------------------------------------------- digits


def test_a_fifth_of_the_digits_is_held_out_always_the_same(digits):
    train, held_out = digits
    assert (len(train), len(held_out)) == (1463, 334)
    rows = [{split[i]["image"].tobytes() for i in range(len(split))} for split in digits]
    assert not rows[0] & rows[1]
    assert len(rows[0] | rows[1]) == 1797
    classes = [np.bincount([split[i]["target"] for i in range(len(split))], minlength=10) for split in digits]
    assert (classes[0] + classes[1]).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert classes[1].min() >= 20
    assert train.fingerprint != held_out.fingerprint
    assert [train.fingerprint[:8], held_out.fingerprint[:8]] == ["545b55dd", "e41f8892"]


def test_a_split_is_what_batches_are_made_of(digits):
    assert all(isinstance(split, Examples) for split in digits)
    assert digits[0].domains == ("digits",)
    assert digits[0].bytes_per_token is None


def test_a_table_that_is_not_known_is_refused(tmp_path, monkeypatch):
    images._digits.cache_clear()
    path = tmp_path / "sklearn" / "datasets" / "data" / "digits.csv.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(b"0,1\n"))
    (tmp_path / "sklearn" / "__init__.py").touch()
    real = importlib.util.find_spec("sklearn")
    spec = importlib.util.spec_from_file_location(
        "sklearn", tmp_path / "sklearn" / "__init__.py", submodule_search_locations=[str(tmp_path / "sklearn")]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=r"digits\.csv\.gz is not the table that is known: pip install"):
        Digits().images("train")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed: pip install scikit-learn"):
        Digits().images("train")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: real)
    assert len(Digits().images("train")) == 1463


# ---------------------------------------------------------------- batches


@pytest.mark.law(7)
def test_batches_are_scaled_pixels_and_say_what_is_padding(digits):
    _, held_out = digits
    parts = list(evaluation_batches(held_out, 64))
    image, target, real, domain = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    assert (image.dtype, image.shape, target.dtype, domain.max()) == (np.float32, (384, 8, 8, 1), np.int32, 0)
    assert (image.min(), image.max()) == (-1, 1)
    assert real.sum() == 334
    assert not real[334:].any()
    found = sorted((((x + 1) * 8).astype(int).tobytes(), t) for x, t in zip(image[:334], target[:334, 0], strict=True))
    given = [held_out[i] for i in range(334)]
    assert found == sorted((e["image"].astype(int).tobytes(), e["target"]) for e in given)


def test_shapes_are_those_of_batches(digits):
    shapes = Classification().shapes(Digits(), 16, 1)
    batch = next(batches(digits[0], 16, seed=0))
    assert [(s.shape, s.dtype) for s in shapes] == [(a.shape, a.dtype) for a in batch]


def test_training_images_move_and_held_out_ones_do_not(tmp_path, digits):
    train, held_out = Classification(shift=1).prepare(Digits(), Bytes(), 1, tmp_path)
    assert train.fingerprint == digits[0].fingerprint
    one, example = np.arange(64, dtype=np.uint8).reshape(8, 8, 1), {"target": 3}
    seen = set()
    for i in range(100):
        moved = train.finish({"image": one, **example}, np.random.default_rng(i))
        assert moved["target"] == 3
        y, x = (int(n) - 4 for n in divmod(moved["image"][4, 4, 0], 8))
        wide = np.pad(one, ((1, 1), (1, 1), (0, 0)), mode="edge")
        np.testing.assert_array_equal(moved["image"], wide[1 + y : 9 + y, 1 + x : 9 + x])
        seen.add((y, x))
    assert seen == set(itertools.product((-1, 0, 1), repeat=2))
    kept = list(evaluation_batches(held_out, 64)), list(evaluation_batches(digits[1], 64))
    assert all(np.array_equal(a, b) for pair in zip(*kept, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.law(9)
def test_moved_images_do_not_depend_on_processes_or_on_resuming(tmp_path):
    train, _ = Classification(shift=1).prepare(Digits(), Bytes(), 1, tmp_path)
    take = lambda n, **options: list(itertools.islice(batches(train, 32, 5, **options), n))  # noqa: E731
    straight, still = take(50), ImageSplit(train.images, "digits", "", 16)
    for whole, *parts in zip(straight[48:], *(take(2, start=48, process=p, processes=2) for p in (0, 1)), strict=True):
        assert all(np.array_equal(w, np.concatenate(halves)) for w, *halves in zip(whole, *parts, strict=True))
    assert not np.array_equal(straight[0].image_BYXC, next(batches(still, 32, 5)).image_BYXC)
    np.testing.assert_array_equal(straight[0].target_BL, next(batches(still, 32, 5)).target_BL)


# ---------------------------------------------------------------- data sets of TFDS

with tfds.core.registered.skip_registration():

    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        """Sixty wide pictures, each of one colour, with a test split of four; found by its files only."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            picture = tfds.features.Image(shape=(4, 6, 3), encoding_format="png")
            features = {"image": picture, "label": tfds.features.ClassLabel(num_classes=5)}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0, 60), "test": self._generate_examples(60, 64)}

        def _generate_examples(self, start, stop):
            for i in range(start, stop):
                file = io.BytesIO()
                Image.fromarray(np.full((4, 6, 3), 4 * i, np.uint8)).save(file, "png")
                yield i, {"image": io.BytesIO(file.getvalue()), "label": i % 5}


@pytest.fixture(scope="module")
def tfds_directory(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tfds")
    TinyPictures(data_dir=folder).download_and_prepare(file_format="array_record")
    return str(folder)


def test_a_prepared_data_set_is_read_by_number_at_one_size(tfds_directory, tmp_path):
    source = TfdsImages("tiny_pictures", V=5, side=2, held_out="test", data_dir=tfds_directory)
    assert Classification().sizes(source, None) == {"V": 5, "image": (2, 2, 3)}
    train, held_out = Classification().prepare(source, None, 1, tmp_path)
    assert (len(train), len(held_out), train.domains) == (60, 4, ("tiny_pictures",))
    for example in (held_out[i] for i in range(4)):
        number = example["image"][0, 0, 0] // 4
        assert (example["image"] == 4 * number).all()
        assert example["target"] == number % 5
    shared = dataclasses.replace(source, held_out="validation", channels=1)
    splits = Classification().prepare(shared, None, 1, tmp_path)
    values = [{int(split[i]["image"][0, 0, 0]) for i in range(len(split))} for split in splits]
    assert splits[0][0]["image"].shape == (2, 2, 1)
    assert values[0] | values[1] == {4 * i for i in range(60)}
    assert values[1]
    assert not values[0] & values[1]


def test_damaged_pictures_are_one_line(tfds_directory, tmp_path):
    """Said when they are read, since all are read while training."""
    shutil.copytree(tfds_directory, tmp_path, dirs_exist_ok=True)
    images = TfdsImages("tiny_pictures", V=5, side=2, held_out="test", data_dir=str(tmp_path)).images("train")
    (file,) = tmp_path.rglob("*train.array_record*")
    file.write_bytes(file.read_bytes()[: 2**16])
    with pytest.raises(ValueError, match=r"its files are damaged \(.*\): prepare the data set again"):
        images[3]


def test_an_image_is_cut_in_the_middle_and_averaged():
    wide = np.zeros((4, 8, 1), np.uint8)
    wide[:, 2:6] = np.repeat(np.repeat(np.array([[[40], [80]], [[120], [160]]], np.uint8), 2, 0), 2, 1)
    wide[:, :2] = 255  # cut off
    assert scaled(wide, (4, 4, 1))[..., 0].tolist() == wide[:, 2:6, 0].tolist()
    small = scaled(wide, (2, 2, 3))
    assert small.shape == (2, 2, 3)
    assert (small[..., 0] == small[..., 2]).all()
    assert np.abs(small[..., 0].astype(int) - [[40, 80], [120, 160]]).max() <= 20  # neighbours have a little say
    assert abs(small.mean() - 100) <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "no_such_data"}, "TFDS knows no such data set"),
        ({"V": 7}, "has 5 classes: set V to that"),
    ],
    ids=str,
)
def test_mistakes_about_a_data_set_are_one_line(change, message, tfds_directory):
    source = dataclasses.replace(TfdsImages("tiny_pictures", V=5, data_dir=tfds_directory), **change)
    with pytest.raises(ValueError, match=message) as caught:
        source.images("train")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- what is refused


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Corpus\(.*\) has none; use Digits\(\)"):
        Classification().sizes(Corpus(), Bytes())
    with pytest.raises(ValueError, match=r"config\.data\.L=64; set it to 1"):
        Classification().shapes(Digits(), 8, 64)
    with pytest.raises(ValueError, match="shift=-1"):
        Classification(shift=-1)
    with pytest.raises(ValueError, match="channels 1"):
        TfdsImages("mnist", V=10, channels=2)
    nothing = dataclasses.make_dataclass("Nothing", [])()
    nothing.images = lambda split: list[Labelled]()
    with pytest.raises(ValueError, match="no image in its train split"):
        Classification().prepare(nothing, None, 1, tmp_path)


# ---------------------------------------------------------------- a study of them


def test_fewer_slots_drop_more_choices(tmp_path):
    """A small instance of experiments/vision/capacity.py."""
    exp = build(vmoe_nano.get_config())
    moe = dataclasses.replace(exp.model.moe, S=40)
    exp = dataclasses.replace(exp, model=dataclasses.replace(exp.model, N=2, D=8, patch=4, moe=moe))
    batch = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), exp.data.shapes(1))
    params, zero = jax.jit(exp.model.init)(jax.random.key(0), batch), jnp.zeros((), jnp.int32)
    state = State(zero, params, None, exp.model.init_router(), zero, zero)
    seen = [look(exp, state, Scatter(factor, "probability"), tmp_path) for factor in (8.0, 0.25)]
    assert seen[0].dropped == 0
    assert seen[1].dropped > 0.6
    assert all(0 < s.accuracy < 0.4 for s in seen), "as good as chance"
