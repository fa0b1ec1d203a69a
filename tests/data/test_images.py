"""Images of the TFDS catalogue, on data sets written by hand: pixels, classes and captions as they are on disk."""

import io
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llmlab.data import Images
from llmlab.tokenizers import Bytes

TOKENIZER = Bytes().build()
FEATURES = "tensorflow_datasets.core.features"


def varint(number: int) -> bytes:
    parts = []
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def example(values: dict[str, Any]) -> bytes:
    """A tf.train.Example, in the wire format of protocol buffers: bytes, or lists of them, or whole numbers."""
    entries = []
    for name, value in values.items():
        if isinstance(value, int):
            feature = field(3, field(1, varint(value)))
        else:
            feature = field(1, b"".join(field(1, item) for item in ([value] if isinstance(value, bytes) else value)))
        entries.append(field(1, field(1, name.encode()) + field(2, feature)))
    return field(1, b"".join(entries))


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "PNG")
    return file.getvalue()


def write_data_set(root: Path, splits: Mapping[str, Sequence[dict[str, Any]]], *, captions: bool, channels: int) -> str:
    from array_record.python.array_record_module import ArrayRecordWriter

    directory = root / "tiny" / "1.0.0"
    directory.mkdir(parents=True)
    for split, examples in splits.items():
        writer = ArrayRecordWriter(str(directory / f"tiny-{split}.array_record-00000-of-00001"), "group_size:1")
        for values in examples:
            writer.write(example(values))
        writer.close()
    shape = {"dimensions": ["-1", "-1", str(channels)]}
    image = {
        "pythonClassName": f"{FEATURES}.image_feature.Image",
        "image": {"shape": shape, "dtype": "uint8", "encodingFormat": "png"},
    }
    text = {"pythonClassName": f"{FEATURES}.text_feature.Text", "text": {}}
    inner = {"pythonClassName": f"{FEATURES}.features_dict.FeaturesDict", "featuresDict": {"features": {"text": text}}}
    several = {
        "pythonClassName": f"{FEATURES}.sequence_feature.Sequence",
        "sequence": {"feature": inner, "length": "-1"},
    }
    label = {
        "pythonClassName": f"{FEATURES}.class_label_feature.ClassLabel",
        "classLabel": {"numClasses": "5"},
    }
    features = {"image": image} | ({"captions": several} if captions else {"label": label})
    description = {"pythonClassName": f"{FEATURES}.features_dict.FeaturesDict", "featuresDict": {"features": features}}
    (directory / "features.json").write_text(json.dumps(description))
    info = {
        "name": "tiny",
        "version": "1.0.0",
        "fileFormat": "array_record",
        "splits": [
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": "1",
                "shardLengths": [str(len(examples))],
            }
            for split, examples in splits.items()
        ],
    }
    (directory / "dataset_info.json").write_text(json.dumps(info))
    return str(root)


def pictures(count: int, seed: int, *shape: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_and_classes_are_those_on_the_disk(channels: int, tmp_path: Path) -> None:
    sides = {"train": pictures(6, 0, 4, 5, channels), "test": pictures(5, 1, 4, 5, channels)}
    splits = {
        name: [{"image": png(image), "label": i % 5} for i, image in enumerate(side)] for name, side in sides.items()
    }
    data = Images("tiny", data_dir=write_data_set(tmp_path, splits, captions=False, channels=channels))
    dataset = data.build(TOKENIZER, sequence_length=None, batch_size=3, seed=0)
    assert (dataset.num_labels, dataset.sizes["train"], dataset.sizes["validation"]) == (5, {"rows": 6}, {"rows": 5})
    for split, side in ((dataset.train, sides["train"]), (dataset.validation, sides["test"])):
        known = {(image / 127.5 - 1).astype(np.float32).round(5).tobytes(): i % 5 for i, image in enumerate(side)}
        batches = [split.batch(step) for step in range(2)]
        images, labels = (np.concatenate([batch[name] for batch in batches]) for name in ("pixel_values", "labels"))
        assert images.shape == (6, 4, 5, channels)
        found = [known.pop(image.round(5).tobytes()) for image in images[: len(side)]]
        assert found == labels[: len(side)].tolist()
        assert (labels[len(side) :] == -100).all()
    assert 0 < dataset.baselines(1)["class frequencies"] < 2


def test_captions_are_the_first_ones_and_images_are_scaled(tmp_path: Path) -> None:
    sides = {"train": pictures(4, 0, 6, 9, 3), "val": [*pictures(1, 1, 6, 9, 3), *pictures(2, 2, 8, 4, 3)]}
    splits = {
        name: [{"image": png(im), "captions/text": [f"{name} {i}".encode(), b"other"]} for i, im in enumerate(side)]
        for name, side in sides.items()
    }
    data = Images(
        "tiny",
        validation_split="val",
        label=None,
        caption="captions/text",
        size=5,
        data_dir=write_data_set(tmp_path, splits, captions=True, channels=3),
    )
    assert list(data.training_texts()) == [f"train {i}" for i in range(4)]
    dataset = data.build(TOKENIZER, sequence_length=12, batch_size=4, seed=0)
    batch = dataset.validation.batch(0)
    assert batch["pixel_values"].shape == (4, 5, 5, 3)
    assert batch["loss_mask"].tolist() == [1, 1, 1, 0]
    for row in range(3):
        number = int(TOKENIZER.decode(batch["input_ids"][row]).removeprefix("val "))
        resized = Image.fromarray(sides["val"][number]).resize((5, 5), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(batch["pixel_values"][row], np.asarray(resized) / 127.5 - 1, atol=1e-6)
    assert data.problems(None, None) == ["captions need a length: set train.sequence_length"]
    unscaled = Images(
        "tiny", validation_split="val", label=None, caption="captions/text", data_dir=data.data_dir
    ).build(TOKENIZER, sequence_length=12, batch_size=4, seed=0)
    with pytest.raises(ValueError, match="images of different sizes are scaled to one, size=224"):
        unscaled.validation.batch(0)


def test_what_is_not_there_is_an_error_that_says_what_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'mnist' is not in .*(?s:.*)download_and_prepare"):
        Images("mnist", data_dir=str(tmp_path)).build(TOKENIZER, sequence_length=None, batch_size=1, seed=0)
    splits = {"train": [{"image": png(pictures(1, 0, 4, 4, 1)[0]), "label": 0}]}
    where = write_data_set(tmp_path, splits, captions=False, channels=1)
    for wrong, message in (
        (Images("tiny", data_dir=where), "no split 'test'; it has 'train'"),
        (
            Images("tiny", validation_split="train", label="digit", data_dir=where),
            "no feature 'digit'; it has 'image', 'label'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            wrong.build(TOKENIZER, sequence_length=None, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="give one, and None for the other"):
        Images("tiny", caption="text")


def test_reading_images_imports_no_tensorflow(tmp_path: Path) -> None:
    splits = {name: [{"image": png(pictures(1, 0, 4, 4, 1)[0]), "label": 0}] for name in ("train", "test")}
    where = write_data_set(tmp_path, splits, captions=False, channels=1)
    program = (
        "import sys; from llmlab.data import Images; from llmlab.tokenizers import Bytes; "
        f"data = Images('tiny', data_dir={where!r}); sizes = dict(sequence_length=None, batch_size=1, seed=0); "
        "print(data.build(Bytes().build(), **sizes).train.batch(0)['labels'][0], "
        "[name for name in sys.modules if name.partition('.')[0] in ('tensorflow', 'jax')])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["0", "[]"]
