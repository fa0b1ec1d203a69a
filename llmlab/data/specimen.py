"""A batch of the shapes that a data config gives, without its data: what planning needs to know of it."""

import numpy as np

from llmlab.data.building import without_segments
from llmlab.data.config import PackedText
from llmlab.data.corrupting import CorruptedTable
from llmlab.data.dataset import Batch, Table
from llmlab.data.packing import Corpus, Layout, Rows
from llmlab.tokenizers.base import Tokenizer


def specimen(data: PackedText, tokenizer: Tokenizer, *, sequence_length: int, batch_size: int) -> Batch:
    """A batch of this config's names, shapes and types; its tokens are made up.

    Args:
        data: documents packed into rows, and what is done to the rows; no source is read.
        tokenizer: its special tokens are put into rows.
        sequence_length: tokens of a row.
        batch_size: rows.
    """
    corruption = data.corruption
    length = sequence_length if corruption is None else corruption.text_length(sequence_length)
    # Two documents, as some corruptions put different ones together.
    lengths = np.full(2, length, np.int64)
    corpus = Corpus(
        tokens=np.zeros(2 * length, np.uint16),
        starts=np.arange(2, dtype=np.int64) * length,
        lengths=lengths,
        hashes=np.arange(2, dtype=np.uint64),
        num_bytes=2 * length,
        has_bos=False,
    )
    share = corruption is None or not (corruption.whole_row and data.isolate)
    layout = Layout(sequence_length=length, isolate=data.isolate, pad_id=0, share=share)
    table: Table = Rows(corpus, None, layout)
    if corruption is not None:
        corrupter = corruption.build(tokenizer, sequence_length)
        table = CorruptedTable(table, corrupter if data.isolate else without_segments(corrupter))
    row = table.read(np.zeros(1, np.int64))
    return {name: np.broadcast_to(array, (batch_size, *array.shape[1:])) for name, array in row.items()}
