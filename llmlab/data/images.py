"""Images: scikit-learn's handwritten digits, which need no network, and data sets of the TFDS catalogue.

pixel_values    (batch, height, width, channels) float32, normalised: (value in [0, 1] - mean) / std
labels          (batch,) classes; or
input_ids       (batch, sequence) a caption, bos text eos, with attention_mask and loss_mask

Digits    1,797 images of 8 x 8 in grey, ten classes (Alpaydin and Kaynak 1998); captions: "a handwritten seven".
          Ten captions for all: in a batch of B about B / 10 images share one, and a contrastive loss cannot end
          below the logarithm of that, since equal texts cannot be told apart.
Images    any TFDS data set with an image and a class or captions (mnist, cifar10, coco_captions), prepared as
          ArrayRecord. Images are decoded as they are read, and scaled to one size.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmlab.data import baselines
from llmlab.data.config import Data
from llmlab.data.dataset import (
    Batch,
    Dataset,
    Numbers,
    Shuffled,
    Table,
    TrainSplit,
    ValidationSplit,
    check_sizes,
)
from llmlab.data.examples import Arrays, Examples, Joined, Ragged, Tables, Texts, pad_of
from llmlab.data.packing import IGNORE
from llmlab.data.sentences import counted, guessing
from llmlab.data.sources import Report, fingerprint_files
from llmlab.data.tfds import prepared, split_of
from llmlab.tokenizers.base import Tokenizer
from llmlab.tokenizers.special import SpecialTokens

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def check_std(std: tuple[float, ...]) -> None:
    """Raises a ValueError unless one can divide by it."""
    if not std or not all(value > 0 for value in std):
        raise ValueError(f"std={std} must be positive")


def normalised(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Pixels in [0, 1] as a model sees them, float32."""
    shift, scale = np.array(mean, np.float32), np.array(std, np.float32)
    return ((pixels.astype(np.float32) - shift) / scale).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Digit:
    """An image, 0 to 16 in each place, and the digit on it."""

    pixels: np.ndarray
    digit: int


@dataclass(frozen=True, kw_only=True)
class Digits(Examples):
    """scikit-learn's handwritten digits (the "dev" extra installs it)."""

    validation_fraction: float = 0.2
    """Part of the images set aside for validation, chosen by their content."""
    captions: bool = False
    """Give a caption in place of the class."""
    caption: str = "a handwritten {}"
    """The caption; {} is the digit's name."""
    scale: int = 1
    """Pixels in height and width for each of the 8 x 8."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from each pixel, all of which are between 0 and 1."""
    std: tuple[float, ...] = (0.5,)
    """What each pixel is divided by."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_std(self.std)
        if self.scale < 1:
            raise ValueError(f"scale={self.scale} is not positive")
        if "{}" not in self.caption:
            raise ValueError(f"caption={self.caption!r} does not say which digit; put {{}} where its name belongs")

    @property
    def task(self) -> str:
        return "images and texts" if self.captions else "classes of images"

    def problems(self, special: SpecialTokens | None, sequence_length: int | None) -> list[str]:
        return caption_problems(special, sequence_length) if self.captions else []

    def read(self) -> tuple[list[Digit], list[Digit]]:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ValueError("Digits are scikit-learn's: pip install scikit-learn, or llmlab[dev]") from None
        images, digits = map(np.asarray, load_digits(return_X_y=True))
        pixels = images.reshape(-1, 8, 8).astype(np.uint8)
        return self.split([Digit(pixels=image, digit=int(digit)) for image, digit in zip(pixels, digits, strict=True)])

    def key(self, example: Digit) -> str:
        return example.pixels.tobytes().hex()

    def texts(self, example: Digit) -> tuple[str, ...]:
        return (self.caption.format(NAMES[example.digit]),) if self.captions else ()

    def training_texts(self) -> Iterator[str]:
        return iter([self.caption.format(name) for name in NAMES] if self.captions else [])

    def content(self) -> list[Any]:
        return [self.captions, self.caption, self.scale, self.mean, self.std]

    def tables(
        self,
        sides: tuple[list[Digit], list[Digit]],
        tokenizer: Tokenizer,
        sequence_length: int | None,
        report: Report,
    ) -> Tables:
        def table(side: list[Digit]) -> Table:
            grey = np.stack([example.pixels for example in side])[..., None] / 16
            pixels = normalised(grey.repeat(self.scale, axis=1).repeat(self.scale, axis=2), self.mean, self.std)
            arrays = {"pixel_values": np.concatenate([pixels, np.zeros_like(pixels[:1])])}
            if self.captions:
                captions = [self.texts(example)[0] for example in side]
                return Joined(Arrays(arrays), caption_table(tokenizer, captions, sequence_length))
            labels = [example.digit for example in side]
            return Arrays(arrays | {"labels": np.array([*labels, IGNORE], np.int32)})

        return picture_tables((table(sides[0]), table(sides[1])), None if self.captions else 10)


@dataclass(frozen=True)
class Images(Data):
    """A TFDS data set of images, on disk in the ArrayRecord format."""

    name: str
    """Name in the catalogue: "mnist", "cifar10", "coco_captions"."""
    split: str = "train"
    """Split to learn from."""
    validation_split: str = "test"
    """Split to measure on."""
    image: str = "image"
    """Feature that holds the image."""
    label: str | None = "label"
    """Feature that holds the class; None where there are captions."""
    caption: str | None = None
    """Feature that holds the caption, the first one of several ("captions/text"); None for none."""
    size: int | None = None
    """Height and width that images are scaled to, then in colour; None where all have one size."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from each channel, or from all."""
    std: tuple[float, ...] = (0.5,)
    """What each channel, or all, is divided by."""
    data_dir: str | None = None
    """Directory of prepared data sets; None for TFDS' own."""

    def __post_init__(self) -> None:
        check_std(self.std)
        if (self.label is None) == (self.caption is None):
            raise ValueError(f"label={self.label!r} and caption={self.caption!r}: give one, and None for the other")

    @property
    def task(self) -> str:
        return "images and texts" if self.caption else "classes of images"

    def problems(self, special: SpecialTokens | None, sequence_length: int | None) -> list[str]:
        return caption_problems(special, sequence_length) if self.caption else []

    def training_texts(self) -> Iterator[str]:
        if self.caption is None:
            return
        examples, _ = self.open(self.split)
        for number in range(len(examples)):
            yield caption_of(value_of(examples[number], self.caption))

    def fingerprint(self) -> str:
        builder = prepared(self.name, self.data_dir)
        splits = [split_of(builder, self.name, split) for split in (self.split, self.validation_split)]
        files = [fingerprint_files([Path(path) for path in split.filepaths], ()) for split in splits]
        parts = [*files, self.split, self.validation_split]
        parts += [self.image, self.label, self.caption, self.size, self.mean, self.std]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def open(self, split: str) -> tuple[Any, Any]:
        """(examples with random access, the features' descriptions); images stay as they are on disk.

        Raises:
            ValueError: there is no such split or feature; the message lists those there are.
        """
        import tensorflow_datasets as tfds

        builder = prepared(self.name, self.data_dir)
        split_of(builder, self.name, split)
        features = dict(builder.info.features or {})
        for wanted in (self.image, self.label, self.caption):
            if wanted is not None and wanted.partition("/")[0] not in features:
                has = ", ".join(map(repr, sorted(features))) or "none"
                raise ValueError(f"the TFDS data set {self.name!r} has no feature {wanted!r}; it has {has}")
        return builder.as_data_source(split=split, decoders={self.image: tfds.decode.SkipDecoding()}), features

    def build(
        self,
        tokenizer: Tokenizer,
        *,
        sequence_length: int | None,
        batch_size: int,
        seed: int,
        cache_dir: Path | None = None,
        report: Report | None = None,
    ) -> Dataset:
        check_sizes(batch_size=batch_size, seed=seed)
        if found := self.problems(tokenizer.special, sequence_length):
            raise ValueError("; ".join(found))
        opened = [self.open(split) for split in (self.split, self.validation_split)]
        first, second = (Encoded(examples, self, tokenizer, sequence_length) for examples, _ in opened)
        train = TrainSplit(Shuffled(first, seed), batch_size=batch_size)
        validation = ValidationSplit(second, batch_size=batch_size)
        num_labels = None if self.label is None else int(opened[0][1][self.label].num_classes)
        tables = picture_tables((first, second), num_labels)
        made_from = json.dumps([self.fingerprint(), tokenizer.fingerprint if self.caption else "", sequence_length])
        return Dataset(
            train=train,
            validation=validation,
            vocab_size=tokenizer.vocab_size,
            fingerprint=hashlib.sha256(made_from.encode()).hexdigest(),
            sources=({"source": repr(self), "fingerprint": self.fingerprint(), "rows": len(first) + len(second)},),
            sizes={"train": {"rows": len(first)}, "validation": {"rows": len(second)}},
            baselines=lambda parts: tables.baselines(train, validation, parts),
            num_labels=num_labels,
        )


class Encoded(Table):
    """Images with classes or captions, read from the disk and decoded as they are asked for."""

    def __init__(self, examples: Any, config: Images, tokenizer: Tokenizer, sequence_length: int | None) -> None:
        self._examples = examples
        self._config = config
        self._tokenizer = tokenizer
        self._length = sequence_length
        self._shape: tuple[int, ...] | None = None
        self._shape = self._image(examples[0]).shape

    def __len__(self) -> int:
        return len(self._examples)

    def read(self, numbers: Numbers) -> Batch:
        known = [self._examples[number] for number in map(int, numbers) if number < len(self)]
        here = np.flatnonzero(numbers < len(self))
        assert self._shape is not None
        pixels = np.zeros((len(numbers), *self._shape), np.float32)
        for place, example in zip(here, known, strict=True):
            pixels[place] = self._image(example)
        config = self._config
        if config.caption is not None:
            captions = [caption_of(value_of(example, config.caption)) for example in known]
            table = caption_table(self._tokenizer, captions, self._length)
            order = np.full(len(numbers), len(known))
            order[here] = np.arange(len(known))
            return {"pixel_values": pixels} | table.read(order)
        assert config.label is not None
        labels = np.full(len(numbers), IGNORE, np.int32)
        labels[here] = [int(value_of(example, config.label)) for example in known]
        return {"pixel_values": pixels, "labels": labels}

    def _image(self, example: Any) -> np.ndarray:
        from PIL import Image

        config = self._config
        with Image.open(io.BytesIO(value_of(example, config.image))) as image:
            shown = image if image.mode in ("L", "RGB") else image.convert("RGB")
            if config.size is not None:
                shown = shown.convert("RGB").resize((config.size, config.size), Image.Resampling.BILINEAR)
            pixels = np.asarray(shown, np.float32) / 255
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        if self._shape is not None and pixels.shape != self._shape:
            raise ValueError(
                f"an image of {config.name} is {pixels.shape} and the first is {self._shape}: images of different "
                "sizes are scaled to one, size=224"
            )
        return normalised(pixels, config.mean, config.std)


def value_of(example: Any, feature: str) -> Any:
    """A feature's value; "captions/text" is the feature text inside captions."""
    for name in feature.split("/"):
        example = [item[name] for item in example] if isinstance(example, list) else example[name]
    return example


def caption_of(value: Any) -> str:
    """The text of a feature that is one, or the first of several."""
    while isinstance(value, (list, np.ndarray)):
        value = value[0]
    return value.decode() if isinstance(value, bytes) else str(value)


def caption_problems(special: SpecialTokens | None, sequence_length: int | None) -> list[str]:
    """Why there can be no captions."""
    found = ["captions need a length: set train.sequence_length"] if sequence_length is None else []
    if special is not None and special.eos is None:
        found.append("captions end in the tokenizer's eos token, whose state stands for the text; it has none")
    return found


def caption_table(tokenizer: Tokenizer, captions: list[str], sequence_length: int | None) -> Texts:
    """Captions as rows: bos text eos. The end token stays when a caption is cut."""
    assert sequence_length is not None
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    room = max(0, sequence_length - len(before) - 1)
    rows = [[*before, *ids[:room], tokenizer.eos_id or 0] for ids in tokenizer.encode_batch(captions)]
    others = {"loss_mask": counted(len(rows))}
    return Texts(Ragged.of([row[-sequence_length:] for row in rows]), sequence_length, pad_of(tokenizer), others)


def picture_tables(tables: tuple[Table, Table], num_labels: int | None) -> Tables:
    """Both sides, with what needs no training: class frequencies, or a guess among the batch."""

    def of_classes(train: TrainSplit, validation: ValidationSplit, parts: int) -> dict[str, float]:
        assert num_labels is not None
        return {"class frequencies": baselines.targets(train, validation, num_labels)}

    return Tables(
        train=tables[0],
        validation=tables[1],
        baselines=guessing if num_labels is None else of_classes,
        num_labels=num_labels,
    )
