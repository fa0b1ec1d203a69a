"""TFDS without TensorFlow: on a data set written with ArrayRecord and a description of it, both by hand."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from llmlab.data.sources import Document
from llmlab.data.tfds import TFDS

TEXTS = [f"document {i}: naïve" for i in range(6)]


def example(features: dict[str, bytes]) -> bytes:
    """A tf.train.Example of bytes features, in the wire format of protocol buffers."""

    def field(number: int, content: bytes) -> bytes:
        assert len(content) < 128  # one byte says how long it is
        return bytes([number << 3 | 2, len(content)]) + content

    entries = [field(1, name.encode()) + field(2, field(1, field(1, value))) for name, value in features.items()]
    return field(1, b"".join(field(1, entry) for entry in entries))


def write_data_set(root: Path, texts: Sequence[bytes], file_format: str = "array_record") -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    directory = root / "tiny" / "1.0.0"
    directory.mkdir(parents=True)
    writer = ArrayRecordWriter(str(directory / f"tiny-train.{file_format}-00000-of-00001"), "group_size:1")
    for i, text in enumerate(texts):
        writer.write(example({"text": text, "title": f"title {i}".encode()}))
    writer.close()
    text_feature = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
    features = {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": {"text": text_feature, "title": text_feature}},
    }
    (directory / "features.json").write_text(json.dumps(features))
    info = {
        "name": "tiny",
        "version": "1.0.0",
        "fileFormat": file_format,
        "splits": [
            {
                "name": "train",
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": "1",
                "shardLengths": [str(len(texts))],
            }
        ],
    }
    (directory / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture
def data_dir(tmp_path: Path) -> str:
    write_data_set(tmp_path, [text.encode() for text in TEXTS])
    return str(tmp_path)


def test_documents_are_the_examples_texts_in_order(data_dir: str) -> None:
    source = TFDS("tiny", data_dir=data_dir)
    items = [item for item in source.read() if isinstance(item, Document)]
    assert [item.text for item in items] == TEXTS
    assert (items[-1].position, items[-1].name) == (source.size(), "tiny/train:5")


def test_splits_versions_and_fields_are_chosen_by_name(data_dir: str) -> None:
    part = TFDS("tiny:1.0.0", "train[2:4]", "title", data_dir=data_dir)
    assert [document.text for document in part.documents()] == ["title 2", "title 3"]
    assert part.size() == 2


def test_the_fingerprint_is_that_of_the_files_split_and_field(
    data_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere, other = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("other")
    write_data_set(elsewhere, [text.encode() for text in TEXTS])
    write_data_set(other, [text.upper().encode() for text in TEXTS])
    fingerprint = TFDS("tiny", data_dir=data_dir).fingerprint()
    assert TFDS("tiny", data_dir=str(elsewhere)).fingerprint() == fingerprint
    others = [
        TFDS("tiny", data_dir=str(other)),
        TFDS("tiny", "train[:3]", data_dir=data_dir),
        TFDS("tiny", field="title", data_dir=data_dir),
    ]
    assert len({fingerprint, *(source.fingerprint() for source in others)}) == 4


def test_a_data_set_that_is_not_on_disk_is_an_error_that_says_how_to_prepare_it(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"'imdb_reviews' is not in .*(?s:.*)download_and_prepare.*(?s:.*)data_dir"
    ):
        TFDS("imdb_reviews", data_dir=str(tmp_path)).fingerprint()


def test_a_missing_split_or_field_is_an_error_that_lists_those_there_are(data_dir: str) -> None:
    with pytest.raises(ValueError, match="no split 'test'; it has 'train'"):
        TFDS("tiny", "test", data_dir=data_dir).fingerprint()
    with pytest.raises(ValueError, match="no split 'test'; it has 'train'"):
        TFDS("tiny", "test", data_dir=data_dir).size()
    with pytest.raises(ValueError, match="no text feature 'body'; it has 'text', 'title'"):
        list(TFDS("tiny", field="body", data_dir=data_dir).read())


def test_a_data_set_in_another_format_is_an_error_that_says_how_to_prepare_it(tmp_path: Path) -> None:
    write_data_set(tmp_path, [b"text"], file_format="tfrecord")
    with pytest.raises(ValueError, match=r"stored as tfrecord.*array_record"):
        TFDS("tiny", data_dir=str(tmp_path)).size()


def test_text_that_is_not_utf8_fails_or_is_skipped(tmp_path: Path) -> None:
    write_data_set(tmp_path, [b"fine", b"na\xefve", b"fine too"])
    with pytest.raises(ValueError, match=r"tiny/train:1: not UTF-8"):
        list(TFDS("tiny", data_dir=str(tmp_path)).read())
    skipping = TFDS("tiny", data_dir=str(tmp_path), on_error="skip")
    assert [document.text for document in skipping.documents()] == ["fine", "fine too"]


def test_reading_imports_no_tensorflow(data_dir: str) -> None:
    program = (
        "import sys; from llmlab.data import TFDS; "
        f"source = TFDS('tiny', data_dir={data_dir!r}); source.fingerprint(); print(len(list(source.documents())), "
        "[name for name in sys.modules if name.partition('.')[0] in ('tensorflow', 'jax')])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["6", "[]"]
