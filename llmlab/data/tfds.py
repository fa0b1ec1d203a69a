"""Data sets of the TensorFlow Datasets catalogue, read without TensorFlow.

A data set that was prepared in the ArrayRecord format has random access through `data_source`, which needs no
TensorFlow (it would take all of a GPU's memory). Preparing one is a step of its own, on a machine with a network: this
module opens what is on disk and never downloads.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlab.data.sources import Document, OnError, Skipped, Source, decode, fingerprint_files, is_blank, skip_or_fail


@dataclass(frozen=True)
class TFDS(Source):
    """A split of a TFDS data set that is on disk in the ArrayRecord format."""

    name: str
    """Name in the catalogue, with config and version where wanted: "wikipedia/20230601.en:1.0.0"."""
    split: str = "train"
    """Split, or a part of one such as "train[:10%]"."""
    field: str = "text"
    """Feature that holds the text."""
    data_dir: str | None = None
    """Directory of prepared data sets; None for TFDS' own ($TFDS_DATA_DIR, or ~/tensorflow_datasets)."""
    on_error: OnError = "fail"
    """A text that is not UTF-8: "fail", or "skip" it and count it."""

    def read(self) -> Iterator[Document | Skipped]:
        examples = self._examples()
        for i in range(len(examples)):
            name = f"{self.name}/{self.split}:{i}"
            text, problem = decode(examples[i][self.field])
            if problem:
                yield skip_or_fail(Skipped(name, problem), self.on_error)
            elif not is_blank(text):
                yield Document(text, name, i + 1)

    def size(self) -> int:
        return len(self._examples())

    def fingerprint(self) -> str:
        files = [Path(path) for path in self._split_info(self._builder()).filepaths]
        return fingerprint_files(files, ("tfds", self.split, self.field, self.on_error))

    def _builder(self) -> Any:
        return prepared(self.name, self.data_dir)

    def _split_info(self, builder: Any) -> Any:
        return split_of(builder, self.name, self.split)

    def _examples(self) -> Any:
        """The examples with random access; of each, only the text is decoded."""
        import tensorflow_datasets as tfds

        builder = self._builder()
        self._split_info(builder)
        features = dict(builder.info.features or {})
        texts = sorted(name for name, feature in features.items() if isinstance(feature, tfds.features.Text))
        if self.field not in texts:
            has = ", ".join(map(repr, texts)) or "none"
            raise ValueError(f"the TFDS data set {self.name!r} has no text feature {self.field!r}; it has {has}")
        others = [name for name in features if name != self.field]
        plain = [name for name in others if not isinstance(features[name], tfds.features.FeaturesDict)]
        return builder.as_data_source(split=self.split, decoders={name: tfds.decode.SkipDecoding() for name in plain})


def prepared(name: str, data_dir: str | None) -> Any:
    """What TFDS calls a builder: the description of a data set that is on disk, and its files.

    Raises:
        FileNotFoundError: it is not on disk; the message says how to prepare it.
        ValueError: it is there in a format without random access.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants, read_only_builder

    where = os.path.expanduser(data_dir or constants.DATA_DIR)
    arguments = f"{name!r}, data_dir={where!r}, file_format='array_record'"
    prepare = f'python -c "import tensorflow_datasets as t; t.builder({arguments}).download_and_prepare()"'
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=where)
    except tfds.core.DatasetNotFoundError:
        raise FileNotFoundError(
            f"the TFDS data set {name!r} is not in {where}, and nothing is downloaded during a run; prepare it once, "
            f"where there is a network:\n  {prepare}\nor point data_dir (or $TFDS_DATA_DIR) to where it is"
        ) from None
    file_format = builder.info.file_format
    if file_format is None or file_format.value != "array_record":
        stored_as = "unknown" if file_format is None else file_format.value
        raise ValueError(
            f"the TFDS data set {name!r} in {builder.data_dir} is stored as {stored_as}, which has no random access "
            f"without TensorFlow; prepare it as array_record in another directory:\n  {prepare}"
        )
    return builder


def split_of(builder: Any, name: str, split: str) -> Any:
    """The description of a split.

    Raises:
        ValueError: there is no such split; the message lists those there are.
    """
    try:
        return builder.info.splits[split]
    except (KeyError, ValueError) as error:
        splits = ", ".join(map(repr, builder.info.splits)) or "none"
        raise ValueError(f"the TFDS data set {name!r} has no split {split!r}; it has {splits}") from error
