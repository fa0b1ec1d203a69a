"""Questions whose answers are spans of a text: {"question": ..., "context": ..., "answer": ..., "answer_start": 17}.

    [CLS] question [SEP] context [SEP]           start_positions, end_positions: the answer's first and last token

Characters become tokens by cutting the context into words and marks, each tokenized by itself with the space before
it, so that it is known which characters a token covers: the positions are those of the words that the answer touches.
A context that does not fit is cut to the part around the answer, in validation as in training; the question is kept.
Without `answer_start`, the answer's first occurrence is meant.
"""

import re
from dataclasses import dataclass

import numpy as np

from llmlab.data.dataset import TrainSplit, ValidationSplit
from llmlab.data.examples import Ragged, Tables, Texts, encode, pad_of
from llmlab.data.labelled import Records, types_of
from llmlab.data.packing import IGNORE
from llmlab.data.records import Record, field_of
from llmlab.data.sources import Report
from llmlab.tokenizers.base import Tokenizer
from llmlab.tokenizers.special import SpecialTokens

_PIECE = re.compile(r"\s*(?:\w+|[^\w\s])")


@dataclass(frozen=True)
class Question:
    """A question, the text with its answer, and where in the text that is, in characters."""

    question: str
    context: str
    start: int
    stop: int


@dataclass(frozen=True)
class Questions(Records):
    """Questions answered by a span of a text each."""

    question: str = "question"
    """Name of the field that holds the question."""
    context: str = "context"
    """Name of the field that holds the text."""
    answer: str = "answer"
    """Name of the field that holds the answer, letter by letter as in the text."""
    answer_start: str = "answer_start"
    """Name of the field that holds the answer's first character, from 0 on; where a record has none, the first
    occurrence counts."""
    token_types: bool = True
    """Give token_type_ids; false for models without token types (RoBERTa)."""

    @property
    def task(self) -> str:
        return "answers in texts"

    def problems(self, special: SpecialTokens | None, sequence_length: int | None) -> list[str]:
        found = super().problems(special, sequence_length)
        if special is not None and None in (special.cls, special.sep):
            found.append(
                "Questions puts [CLS] and [SEP] around question and text, and the tokenizer has not got both: "
                "tokenizer.special=SpecialTokens(cls='[CLS]', sep='[SEP]', ...)"
            )
        return found

    def check(self, record: Record, where: str) -> Question:
        question, context, answer = (field_of(record, n, where) for n in (self.question, self.context, self.answer))
        if not answer.strip():
            raise ValueError(f"{where}: field {self.answer!r} is blank; only answered questions can be learnt from")
        start = context.find(answer)
        if self.answer_start in record:
            start = int(field_of(record, self.answer_start, where, object))
        if start < 0 or not context.startswith(answer, start):
            raise ValueError(f"{where}: the answer {answer[:50]!r} does not stand at character {start} of the context")
        return Question(question, context, start, start + len(answer))

    def texts(self, example: Question) -> tuple[str, ...]:
        return (example.context, example.question)

    def tables(
        self,
        sides: tuple[list[Question], list[Question]],
        tokenizer: Tokenizer,
        sequence_length: int | None,
        report: Report,
    ) -> Tables:
        assert sequence_length is not None
        tables, cut = [], 0
        for side in sides:
            asked = encode(tokenizer, [example.question for example in side], report)
            pieces = [list(_PIECE.finditer(example.context)) for example in side]
            tokens = iter(encode(tokenizer, [match[0] for row in pieces for match in row], report))
            rows, positions = [], np.full((2, len(side) + 1), IGNORE, np.int32)
            for number, example in enumerate(side):
                ids, first, last = _locate(example, [(match, next(tokens)) for match in pieces[number]])
                row, second, offset = _row(tokenizer, asked[number], ids, first, last, sequence_length)
                rows.append((row, second))
                cut += len(row) < 3 + len(asked[number]) + len(ids)
                if offset + last < len(row) - 1:
                    positions[:, number] = offset + first, offset + last
            others = {"start_positions": positions[0], "end_positions": positions[1]}
            if self.token_types:
                others["token_type_ids"] = types_of(rows, sequence_length)
            tables.append(Texts(Ragged.of([row for row, _ in rows]), sequence_length, pad_of(tokenizer), others))
        total = sum(map(len, sides))
        remarks = (f"{cut} of {total} questions and texts are longer than {sequence_length} tokens and are cut",)
        return Tables(train=tables[0], validation=tables[1], baselines=_guessing, remarks=remarks if cut else ())


def _locate(example: Question, pieces: list[tuple[re.Match[str], list[int]]]) -> tuple[list[int], int, int]:
    """The context's tokens, and the first and last of those that the answer touches."""
    ids: list[int] = []
    touched: list[int] = []
    for match, tokens in pieces:
        begin = match.end() - len(match[0].lstrip())
        if begin < example.stop and match.end() > example.start and tokens:
            touched += [len(ids), len(ids) + len(tokens) - 1]
        ids += tokens
    return (ids, touched[0], touched[-1]) if touched else (ids, len(ids), len(ids))


def _row(
    tokenizer: Tokenizer, question: list[int], context: list[int], first: int, last: int, length: int
) -> tuple[list[int], int, int]:
    """(row, where the context begins, where the context's token 0 would be)."""
    assert tokenizer.cls_id is not None
    assert tokenizer.sep_id is not None
    question = question[: max(0, length - 4)]  # room for one token of the context
    room = max(0, length - 3 - len(question))
    start = 0
    if len(context) > room:  # the answer in the middle, as far as there is text
        start = max(0, min((first + last + 1 - room) // 2, len(context) - room, first))
    row = [tokenizer.cls_id, *question, tokenizer.sep_id, *context[start : start + room], tokenizer.sep_id]
    second = 2 + len(question)
    return row[:length], second, second - start


def _guessing(train: TrainSplit, validation: ValidationSplit, parts: int) -> dict[str, float]:
    """What it costs to think every token of a row the answer's first, and its last, with equal probability."""
    total, count = 0.0, 0
    for step in range(validation.num_batches):
        batch = validation.batch(step)
        counted = batch["start_positions"] != IGNORE
        total += float(np.log(batch["attention_mask"].sum(axis=1))[counted].sum())
        count += int(counted.sum())
    return {"any token": total / count if count else float("nan")}
