from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data.packing import Corpus, Layout, Rows

CorpusOf = Callable[..., Corpus]
PAD = 999

documents_of_any_length = st.lists(st.integers(0, 12), min_size=1, max_size=12).map(
    lambda lengths: [[100 * i + j for j in range(length)] for i, length in enumerate(lengths)]
)


def rows_by_hand(
    documents: Sequence[Sequence[int]], order: Sequence[int], length: int, isolate: bool
) -> list[dict[str, list[int]]]:
    """The definition of packing, one token at a time."""
    stream = [(token, i, j) for i in order for j, token in enumerate(documents[i])]
    rows = []
    for start in range(0, len(stream), length):
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "segment_ids": [], "position_ids": []}
        segment, position = 1, 0
        for column in range(start, start + length):
            if column >= len(stream):
                values = (PAD, -100, 0, 0)
            else:
                token, document, _ = stream[column]
                if isolate and column > start and stream[column - 1][1] != document:
                    segment, position = segment + 1, 0
                following = stream[column + 1] if column + 1 < len(stream) else None
                scored = following is not None and (not isolate or following[1] == document)
                values = (token, following[0] if following and scored else -100, segment, position)
                position += 1
            for name, value in zip(row, values, strict=True):
                row[name].append(value)
        rows.append(row)
    return rows


@given(documents=documents_of_any_length, data=st.data(), length=st.integers(1, 9), isolate=st.booleans())
def test_rows_are_what_packing_one_token_at_a_time_gives(
    documents: list[list[int]], data: st.DataObject, length: int, isolate: bool, corpus_of: CorpusOf
) -> None:
    order = data.draw(st.permutations(range(len(documents))))
    rows = Rows(corpus_of(documents), np.array(order), Layout(sequence_length=length, isolate=isolate, pad_id=PAD))
    expected = rows_by_hand(documents, order, length, isolate)
    assert len(rows) == len(expected)
    wanted = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1))) if expected else [], np.int64)
    batch = rows.read(wanted)
    for name, array in batch.items():
        assert array.dtype == np.int32
        np.testing.assert_array_equal(array, np.array([expected[i][name] for i in wanted]).reshape(-1, length))


@given(documents=documents_of_any_length, length=st.integers(1, 9), isolate=st.booleans())
def test_rows_hold_every_token_once_and_score_every_token_that_has_a_predecessor_once(
    documents: list[list[int]], length: int, isolate: bool, corpus_of: CorpusOf
) -> None:
    corpus = corpus_of(documents)
    rows = Rows(corpus, None, Layout(sequence_length=length, isolate=isolate, pad_id=PAD))
    batch = rows.read(np.arange(len(rows)))
    inputs = batch["input_ids"][batch["segment_ids"] > 0]
    assert inputs.tolist() == [token for document in documents for token in document]
    scored = batch["labels"][batch["labels"] != -100]
    pieces = documents if isolate else [[token for document in documents for token in document]]
    assert scored.tolist() == [token for piece in pieces for token in piece[1:]]
    assert len(scored) == corpus.num_scored(isolate)


@given(documents=documents_of_any_length, data=st.data(), length=st.integers(1, 9))
def test_without_sharing_rows_are_those_of_each_document_alone(
    documents: list[list[int]], data: st.DataObject, length: int, corpus_of: CorpusOf
) -> None:
    order = data.draw(st.permutations(range(len(documents))))
    layout = Layout(sequence_length=length, isolate=True, pad_id=PAD, share=False)
    rows = Rows(corpus_of(documents), np.array(order), layout)
    expected = [row for i in order for row in rows_by_hand(documents, [i], length, True)]
    assert len(rows) == len(expected) == layout.num_rows(np.array([len(document) for document in documents]))
    if not expected:
        return
    batch = rows.read(np.arange(len(rows) + 1))
    for name, array in batch.items():
        np.testing.assert_array_equal(array[:-1], np.array([row[name] for row in expected]).reshape(-1, length))
    assert not batch["segment_ids"][-1].any()


def test_changing_one_document_changes_no_other_document_in_its_row(corpus_of: CorpusOf) -> None:
    layout = Layout(sequence_length=12, isolate=True, pad_id=PAD)
    before, after = (
        Rows(corpus_of([[1, 2, 3], middle, [7, 8, 9]]), None, layout).read(np.array([0]))
        for middle in ([4, 5, 6], [40, 50, 60])
    )
    changed = {name: before[name] != after[name] for name in before}
    assert changed["input_ids"][0].nonzero()[0].tolist() == [3, 4, 5]
    assert changed["labels"][0].nonzero()[0].tolist() == [3, 4]
    assert not changed["segment_ids"].any()
    assert not changed["position_ids"].any()


def test_rows_of_the_module_docstring(corpus_of: CorpusOf) -> None:
    a, b, c, d = (range(start, start + length) for start, length in ((0, 11), (20, 3), (30, 2), (40, 9)))
    rows = Rows(corpus_of([a, b, c, d]), None, Layout(sequence_length=8, isolate=True, pad_id=PAD))
    batch = {name: array[0].tolist() for name, array in rows.read(np.array([1])).items()}
    assert batch == {
        "input_ids": [8, 9, 10, 20, 21, 22, 30, 31],
        "labels": [9, 10, -100, 21, 22, -100, 31, -100],
        "segment_ids": [1, 1, 1, 2, 2, 2, 3, 3],
        "position_ids": [0, 1, 2, 0, 1, 2, 0, 1],
    }


def test_a_row_number_beyond_the_last_gives_padding(corpus_of: CorpusOf) -> None:
    rows = Rows(corpus_of([[1, 2, 3]]), None, Layout(sequence_length=2, isolate=True, pad_id=PAD))
    batch = rows.read(np.array([len(rows)]))
    assert {name: array.tolist() for name, array in batch.items()} == {
        "input_ids": [[PAD, PAD]],
        "labels": [[-100, -100]],
        "segment_ids": [[0, 0]],
        "position_ids": [[0, 0]],
    }


@pytest.mark.parametrize(
    ("has_bos", "isolate", "expected"),
    [
        (True, True, 70),  # a document's first token is bos: every byte is predicted
        (True, False, 70),
        (False, True, 56),  # 8 of 10 tokens are predicted
        (False, False, 63),  # 9 of 10
    ],
)
def test_scored_bytes_leave_out_the_share_of_tokens_that_nothing_predicts(
    has_bos: bool, isolate: bool, expected: int, corpus_of: CorpusOf
) -> None:
    corpus = corpus_of([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], num_bytes=70, has_bos=has_bos)
    assert corpus.num_scored_bytes(isolate) == expected
