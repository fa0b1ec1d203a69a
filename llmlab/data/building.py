"""From a data config and a tokenizer to a data set."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmlab.data import baselines
from llmlab.data.config import PackedText, Weighted
from llmlab.data.corrupting import CorruptedStream, CorruptedTable, attended
from llmlab.data.corruption import Corrupter, Row
from llmlab.data.dataset import (
    Concatenated,
    Dataset,
    Mixed,
    Stream,
    Table,
    TrainSplit,
    ValidationSplit,
    check_sizes,
)
from llmlab.data.draws import Draws
from llmlab.data.packing import Corpus, Layout, PackedStream, Rows
from llmlab.data.sources import Report, Source
from llmlab.data.splitting import validation_below
from llmlab.data.store import Frame, TokenStore, open_or_build
from llmlab.tokenizers.base import Tokenizer


def build(
    data: PackedText,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    cache_dir: Path | None,
    report: Report | None,
) -> Dataset:
    """The data set of a config; `Data.build` says what the arguments are."""
    check_sizes(sequence_length=sequence_length, batch_size=batch_size, seed=seed)
    corruption = data.corruption
    frame = choose_frame(tokenizer, bos=data.bos, isolate=data.isolate)
    if corruption is not None and not corruption.framed:  # it puts its own tokens around rows
        frame = Frame(bos=None, eos=None if data.isolate else frame.eos)

    def store_of(source: Source) -> TokenStore:
        return open_or_build(source, tokenizer, frame, cache_dir=cache_dir, report=report)

    train: list[Corpus] = []
    validation: list[Corpus] = []
    stores: list[tuple[Source, TokenStore]] = []
    for part in data.weighted():
        stores.append((part.source, store_of(part.source)))
        if part.validation is None:
            sides = _split(stores[-1][1], part, data.validation_fraction)
        else:
            stores.append((part.validation, store_of(part.validation)))
            sides = (_whole(stores[-2][1]), _whole(stores[-1][1]))
        train.append(sides[0])
        validation.append(sides[1])
    layout = Layout(
        sequence_length=sequence_length if corruption is None else corruption.text_length(sequence_length),
        isolate=data.isolate,
        pad_id=0 if tokenizer.pad_id is None else tokenizer.pad_id,
        share=corruption is None or not (corruption.whole_row and data.isolate),
    )
    weights = [part.weight for part in data.weighted()]
    made_from = [[store.fingerprint for _, store in stores], weights, data.isolate, data.validation_fraction]
    stream: Stream = Mixed([PackedStream(corpus, layout, seed, i) for i, corpus in enumerate(train)], weights)
    table: Table = Concatenated([Rows(corpus, None, layout) for corpus in validation])
    scored = {
        "documents": sum(corpus.num_documents for corpus in validation),
        "tokens": sum(corpus.num_scored(data.isolate) for corpus in validation),
        "bytes": sum(corpus.num_scored_bytes(data.isolate) for corpus in validation),
    }
    bytes_per_token = scored["bytes"] / scored["tokens"] if scored["tokens"] else None
    if corruption is not None:
        if corruption.compares:
            _check_others([*train, *validation])
        corrupter = corruption.build(tokenizer, sequence_length)
        if not data.isolate:
            corrupter = without_segments(corrupter)
        stream, table = CorruptedStream(stream, corrupter, seed), CorruptedTable(table, corrupter)
        scored, bytes_per_token = _sizes(validation), None
        made_from.append(repr(corruption))
    splits = TrainSplit(stream, batch_size=batch_size), ValidationSplit(table, batch_size=batch_size)
    return Dataset(
        train=splits[0],
        validation=splits[1],
        vocab_size=tokenizer.vocab_size,
        fingerprint=hashlib.sha256(json.dumps(made_from).encode()).hexdigest(),
        sources=tuple(_describe(source, store) for source, store in stores),
        sizes={"train": _sizes(train), "validation": scored},
        baselines=lambda parts: _baselines(data, splits, train, validation, tokenizer.vocab_size),
        bytes_per_token=bytes_per_token,
        remarks=tuple(_remarks(stores, train, validation)),
    )


def _baselines(
    data: PackedText,
    splits: tuple[TrainSplit, ValidationSplit],
    train: list[Corpus],
    validation: list[Corpus],
    vocab_size: int,
) -> dict[str, float]:
    """What counting achieves at the task."""
    corruption = data.corruption
    if corruption is None:
        return baselines.next_token(train, validation, vocab_size, isolate=data.isolate)
    if corruption.previous is not None:
        return baselines.sequences(*splits, vocab_size, corruption.previous)
    unigram = baselines.targets(*splits, vocab_size)
    if corruption.compares:
        return {"unigram and coin": unigram + baselines.targets(*splits, 2, "next_sentence_label")}
    return {"unigram": unigram}


def without_segments(corrupter: Corrupter) -> Corrupter:
    """Rows in which documents are not kept apart say where padding is as rows of a single text do."""

    def corrupt(row: Row, draws: Draws, other: Callable[[], Row]) -> Row:
        corrupted = corrupter(row, draws, other)
        if "segment_ids" in corrupted:
            real = corrupted.pop("segment_ids") > 0
            corrupted |= {"attention_mask": attended(int(real.sum()), len(real))}
            del corrupted["position_ids"]
        return corrupted

    return corrupt


def _check_others(corpora: list[Corpus]) -> None:
    for corpus in corpora:
        if np.count_nonzero(corpus.lengths) < 2:
            raise ValueError(
                "pairs of segments from different documents need two documents at least on both sides of the split; "
                r'cut files into more documents (TextFiles(..., separator="\n\n")), or change validation_fraction'
            )


def _sizes(corpora: list[Corpus]) -> dict[str, int]:
    return {
        "documents": sum(corpus.num_documents for corpus in corpora),
        "tokens": sum(corpus.num_tokens for corpus in corpora),
        "bytes": sum(corpus.num_bytes for corpus in corpora),
    }


def choose_frame(tokenizer: Tokenizer, *, bos: bool, isolate: bool) -> Frame:
    """The tokens around every document: the tokenizer's bos, if wanted, and its eos, where it has them.

    An encoder's tokenizer may have cls and sep instead. In plain concatenation, a token that is both (GPT-2's) stands
    between documents once, not twice.
    """
    begin = tokenizer.cls_id if tokenizer.bos_id is None else tokenizer.bos_id
    end = tokenizer.sep_id if tokenizer.eos_id is None else tokenizer.eos_id
    return Frame(bos=begin if bos and not (begin == end and not isolate) else None, eos=end)


def _whole(store: TokenStore) -> Corpus:
    return Corpus.select(store, np.ones(len(store.hashes), bool))


def _split(store: TokenStore, part: Weighted, fraction: float) -> tuple[Corpus, Corpus]:
    """Training and validation documents of a source that has no validation documents of its own."""
    chosen = store.hashes < np.uint64(validation_below(fraction))
    sides = Corpus.select(store, ~chosen), Corpus.select(store, chosen)
    for name, side in zip(("training", "validation"), sides, strict=True):
        if not side.num_documents:
            raise ValueError(
                f"validation_fraction={fraction} leaves no document for {name}: {part.source} has "
                f"{len(chosen)} document{'s' if len(chosen) > 1 else ''}, and a split never cuts one; give validation "
                "documents of their own (validation=TextFiles(...)), cut files into more documents "
                r'(TextFiles(..., separator="\n\n")), or change validation_fraction'
            )
    return sides


def _describe(source: Source, store: TokenStore) -> dict[str, object]:
    return {
        "source": repr(source),
        "fingerprint": store.fingerprint,
        "documents": len(store.hashes),
        "tokens": int(store.offsets[-1]),
        "bytes": int(store.num_bytes.sum()),
        "skipped": store.num_skipped,
    }


def _remarks(stores: list[tuple[Source, TokenStore]], train: list[Corpus], validation: list[Corpus]) -> list[str]:
    remarks = []
    for source, store in stores:
        if store.rebuilt:
            remarks.append(f"a damaged token store was built again: {store.rebuilt}")
        if store.num_skipped:
            remarks.append(
                f"{store.num_skipped} piece{'s' if store.num_skipped > 1 else ''} of {source} could not be read and "
                f"{'were' if store.num_skipped > 1 else 'was'} skipped: {'; '.join(store.skipped[:3])}"
                f"{'; ...' if store.num_skipped > 3 else ''}"
            )
    held_out = np.concatenate([corpus.hashes for corpus in validation])
    seen = int(np.isin(held_out, np.concatenate([corpus.hashes for corpus in train])).sum())
    if seen:
        remarks.append(f"{seen} of {len(held_out)} validation documents are training documents as well")
    return remarks
