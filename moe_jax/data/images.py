"""Images with their classes."""

import dataclasses
import functools
import gzip
import hashlib
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Float32, Int32, UInt8
from PIL import Image

from moe_jax.core.ranges import NonNegativeInt, PositiveInt, Range, check_ranges
from moe_jax.data import records
from moe_jax.data.documents import Split, digest, fingerprint, is_held_out
from moe_jax.data.preparation import SERIAL, Preparation
from moe_jax.data.terms import loss_mask, predictions

VERSION = "1"  # raise it when the same source gives other splits
HELD_OUT = 0.2  # share of the digits
DIGITS = "6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8"  # sha256 of their table


class Images(NamedTuple):
    """A class is a target sequence of one."""

    image_BYXC: Float32[np.ndarray, "B Y X C"]  # from -1 to 1
    target_BL: Int32[np.ndarray, "B 1"]
    loss_mask_BL: Bool[np.ndarray, "B 1"]  # False where a row is padding
    domain_B: Int32[np.ndarray, "B"]


class Labelled(NamedTuple):
    """An image as it is kept, and its class."""

    image_YXC: UInt8[np.ndarray, "Y X C"]
    label: int


class ImageSplit:
    """A split as random-access images of one domain; pixels go from 0 to `largest`."""

    bytes_per_token = None  # there is no text

    def __init__(self, images: Sequence[Labelled], domain: str, fingerprint: str, largest: int = 255, shift: int = 0):
        self.images, self.fingerprint, self.largest, self.shift = images, fingerprint, largest, shift
        self.domains = (domain,)
        self.domain_W = np.zeros(len(images), np.int32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Image i: its pixels, its class as `target`, and that it is `real`."""
        image_YXC, label = self.images[i]
        return {"image": image_YXC, "target": np.array(label, np.int32), "real": np.array(True)}

    @property
    def padding(self) -> dict[str, np.ndarray]:
        """Example without content, which fills a batch."""
        return {name: np.zeros_like(value) for name, value in self[0].items()}

    def finish(self, example: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The image moved by up to `shift` pixels each way; its edge fills the gap."""
        if not self.shift:
            return example
        wide = np.pad(example["image"], [(self.shift, self.shift)] * 2 + [(0, 0)], mode="edge")
        (y, x), (Y, X, _) = rng.integers(2 * self.shift + 1, size=2), example["image"].shape
        return {**example, "image": wide[y : y + Y, x : x + X]}

    def batch(self, examples: Sequence[dict[str, np.ndarray]]) -> Images:
        """Examples side by side."""
        image_BYXC, target_B, real_B = (np.stack([e[name] for e in examples]) for name in ("image", "target", "real"))
        scaled_BYXC = image_BYXC.astype(np.float32) * np.float32(2 / self.largest) - 1
        return Images(scaled_BYXC, target_B[:, None], real_B[:, None], np.zeros(len(examples), np.int32))


@dataclasses.dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 digits of 8 x 8 pixels (UCI, Alpaydin & Kaynak 1998); a fifth is held out, by digest."""

    V: ClassVar[int] = 10
    image: ClassVar[tuple[int, int, int]] = (8, 8, 1)
    largest: ClassVar[int] = 16
    name: ClassVar[str] = "digits"

    def images(self, split: Split) -> list[Labelled]:
        """Images of one split, in the order of the table."""
        rows = [Labelled(row[:-1].reshape(self.image), int(row[-1])) for row in _digits()]
        held_out = [int(digest(row.image_YXC.tobytes())[:8], 16) < HELD_OUT * 2**32 for row in rows]
        return [row for row, held in zip(rows, held_out, strict=True) if held == (split == "held_out")]

    def fingerprint(self) -> str:
        return DIGITS


@functools.cache
def _digits() -> UInt8[np.ndarray, "N 65"]:
    """Pixels row by row, then the class; ValueError if scikit-learn is not there, or its table another."""
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise ValueError("Digits() are a table of scikit-learn's, which is not installed: pip install scikit-learn")
    path = pathlib.Path(found.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    text = gzip.decompress(path.read_bytes()) if path.is_file() else b""
    if hashlib.sha256(text).hexdigest() != DIGITS:
        raise ValueError(f"{path} is not the table that is known: pip install --force-reinstall scikit-learn")
    return np.array([line.split(b",") for line in text.split()], np.uint8)


@dataclasses.dataclass(frozen=True)
class TfdsImages:
    """A data set of TensorFlow Datasets with an `image`, cut and scaled to `side` x `side`, and a `label` of V."""

    name: str
    V: PositiveInt
    side: PositiveInt = 224
    channels: Annotated[int, Range(1, 3)] = 3  # of an image
    held_out: str = "validation"  # where there is no such split, images of `train` are chosen by their number
    data_dir: str | None = None  # of TFDS; None is its own default
    largest: ClassVar[int] = 255

    def __post_init__(self):
        check_ranges(self)
        if self.channels == 2:
            raise ValueError(f"{self}: give channels 1 (grey) or 3 (colours).")

    @property
    def image(self) -> tuple[int, int, int]:
        return self.side, self.side, self.channels

    def images(self, split: Split) -> "Pictures":
        """Images of one split, read and scaled at access."""
        builder = self._builder()
        shared = self.held_out not in builder.info.splits
        opened = records.records(self, builder, "train" if shared or split == "train" else self.held_out)
        numbers = np.arange(len(opened))
        if shared:
            held = np.array([is_held_out(digest(f"{self.name} {i}".encode())) for i in numbers], bool)
            numbers = numbers[held == (split == "held_out")]
        return Pictures(self, opened, numbers)

    def fingerprint(self) -> str:
        """A sha256 of what TFDS knows about the data set."""
        return fingerprint(records.tfds_facts(self, self._builder()))

    def _builder(self) -> tfds.core.DatasetBuilder:
        builder = records.builder(self)
        features = builder.info.features
        if not {"image", "label"} <= set(features) or not isinstance(features["image"], tfds.features.Image):
            raise ValueError(f"{self} has the features {sorted(features)}: an image and a label are needed")
        if features["label"].num_classes != self.V:
            raise ValueError(f"{self} has {features['label'].num_classes} classes: set V to that")
        return builder


class Pictures(Sequence):
    """Some of a data set's images, by number, brought to one size."""

    def __init__(self, source: TfdsImages, opened: Any, numbers: np.ndarray):
        self.source, self.opened, self.numbers = source, opened, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i) -> Labelled:
        (record,) = records.read_records(self.source, self.opened, [int(self.numbers[i])])
        return Labelled(scaled(record["image"], self.source.image), int(record["label"]))


def scaled(image_YXC: UInt8[np.ndarray, "..."], size: tuple[int, int, int]) -> UInt8[np.ndarray, "..."]:
    """The middle of an image, as large as it can be, at another size; grey becomes colours, or colours grey."""
    Y, X, channels = size
    picture = Image.fromarray(image_YXC[..., 0] if image_YXC.shape[-1] == 1 else image_YXC)
    picture = picture.convert("L" if channels == 1 else "RGB")
    width = min(picture.width, max(1, round(picture.height * X / Y)))
    height = min(picture.height, max(1, round(picture.width * Y / X)))
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    middle = picture.crop((left, top, left + width, top + height))
    return np.asarray(middle.resize((X, Y), Image.Resampling.BILINEAR)).reshape(size)


@dataclasses.dataclass(frozen=True)
class Classification:
    """The class of an image. config.data.L is 1: an image has one class.

    shift: in training, images are moved by up to so many pixels.
    """

    shift: NonNegativeInt = 0
    batch_kind: ClassVar = "images"
    targets: ClassVar = staticmethod(loss_mask)
    terms: ClassVar = staticmethod(predictions)

    def __post_init__(self):
        check_ranges(self)

    def sizes(self, source: Any, tokenizer: Any) -> dict[str, Any]:
        """Sizes of the model that follow from the data."""
        if not hasattr(source, "images"):
            raise ValueError(f"Classification() needs images, and {source} has none; use Digits() or TfdsImages(...).")
        return {"V": source.V, "image": source.image}

    def shapes(self, source: Any, B: int, L: int) -> Images:
        """Shapes of a batch, as arrays without values."""
        if L != 1:
            raise ValueError(f"An image has one class, but config.data.L={L}; set it to 1.")
        of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
        image, one = of(jnp.float32, B, *source.image), of(jnp.int32, B, 1)
        return Images(image, one, of(jnp.bool, B, 1), of(jnp.int32, B))  # type: ignore[arg-type]

    def prepare(
        self, source: Any, tokenizer: Any, L: int, directory: pathlib.Path, how: Preparation = SERIAL
    ) -> tuple[ImageSplit, ImageSplit]:
        """The training and the held-out images, which are not moved; nothing is kept under `directory`."""

        def split(which: Split, shift: int) -> ImageSplit:
            images = source.images(which)
            if not len(images):
                raise ValueError(f"{source} has no image in its {which} split: give it more")
            key = fingerprint([source.fingerprint(), repr(source), which, VERSION])
            return ImageSplit(images, source.name, key, source.largest, shift)

        return split("train", self.shift), split("held_out", 0)
