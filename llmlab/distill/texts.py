"""Sequence-level distillation: the student is trained on what the teacher writes (Kim and Rush 2016, 1606.07947).

    Pairs(source, target)            the student learns the targets that people wrote
    TeacherTexts(..., teacher=RUN)   the student learns what its teacher writes for the same sources

What the teacher writes is simpler than what people wrote: one way to say it and not many, so a small model can follow.
No distribution is compared, only texts are read: the student may have a tokenizer of its own. Validation stays on the
files' own targets.

The teacher writes once; its texts are kept in $LLMLAB_CACHE (or ~/.cache/llmlab) by its weights, the sources and the
decoding, a file for every 512 sources, so that an interrupted run goes on and every other run finds them.
"""

import abc
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlab import buckets
from llmlab.data.dataset import Dataset
from llmlab.data.pairs import Pairs
from llmlab.data.sources import Report
from llmlab.data.store import default_cache_dir
from llmlab.infer.beam import beam_search
from llmlab.infer.generate import generate
from llmlab.infer.greedy import greedy
from llmlab.infer.sampling import Sampling
from llmlab.tokenizers import Tokenizer
from llmlab.training.directory import write_json

_PART = 512  # sources of a file: seconds to minutes of a teacher's work
_ROWS = 64  # sources that are decoded together


@dataclass(frozen=True, kw_only=True)
class Decoding(abc.ABC):
    """How a teacher writes."""

    @abc.abstractmethod
    def write(
        self, model: Any, tokenizer: Tokenizer, sources: Sequence[Sequence[int]], *, length: int, first: int
    ) -> list[list[int]]:
        """Tokens of the target of each source, without start and end.

        Args:
            model: an encoder-decoder.
            tokenizer: the one that it was trained with.
            sources: tokens, framed as the teacher was trained.
            length: longest target.
            first: number of the first source among all, for whoever draws at random.
        """


@dataclass(frozen=True, kw_only=True)
class Beam(Decoding):
    """The best sequence that beam search finds, as in the paper."""

    num_beams: int = 5
    """Prefixes that live: as many times the time of Greedy()."""
    length_penalty: float = 1.0
    """Power of the length that a log-probability is divided by; 0 prefers short targets."""

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"num_beams={self.num_beams} is not positive; 5 is the paper's, 1 is Greedy()")

    def write(
        self, model: Any, tokenizer: Tokenizer, sources: Sequence[Sequence[int]], *, length: int, first: int
    ) -> list[list[int]]:
        found = beam_search(
            model,
            sources,
            max_new_tokens=length,
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            eos_id=tokenizer.eos_id,
            num_tokens=tokenizer.vocab_size,
            batch_size=_ROWS,
        )
        return [list(hypotheses[0].token_ids) for hypotheses in found]


@dataclass(frozen=True, kw_only=True)
class Greedy(Decoding):
    """The most probable token at every place."""

    def write(
        self, model: Any, tokenizer: Tokenizer, sources: Sequence[Sequence[int]], *, length: int, first: int
    ) -> list[list[int]]:
        eos_id, num_tokens = tokenizer.eos_id, tokenizer.vocab_size
        return greedy(model, sources, max_new_tokens=length, eos_id=eos_id, num_tokens=num_tokens, batch_size=_ROWS)


@dataclass(frozen=True, kw_only=True)
class Sampled(Decoding):
    """Tokens drawn from the teacher's distribution: as varied as what it knows, errors included."""

    temperature: float = 1.0
    """Divides the scores: below 1 sharper."""
    top_p: float | None = None
    """Draw among the most probable tokens whose mass reaches p only."""
    seed: int = 0
    """Of the draws, below 2^32."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed={self.seed} is not in 0 ... 2^32 - 1")
        self._sampling(0)

    def _sampling(self, number: int) -> Sampling:
        """How the target of a source is drawn: equal sources get targets of their own."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=(self.seed << 32) + number)

    def write(
        self, model: Any, tokenizer: Tokenizer, sources: Sequence[Sequence[int]], *, length: int, first: int
    ) -> list[list[int]]:
        sampling = [self._sampling(first + number) for number in range(len(sources))]
        drawn = generate(model, tokenizer, list(sources), max_new_tokens=length, sampling=sampling, max_rows=_ROWS)
        return [list(completion.token_ids) for completion in drawn]


@dataclass(frozen=True)
class TeacherTexts(Pairs):
    """Sources of files with targets that a teacher writes; the files' own targets are for validation alone."""

    _: dataclasses.KW_ONLY
    teacher: str
    """Run or Hugging Face directory of an encoder-decoder."""
    decoding: Decoding = Greedy()
    """How it writes: Beam(), Greedy() or Sampled()."""
    written_length: int = 64
    """Longest target that it writes, in its own tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.written_length < 1:
            raise ValueError(f"written_length={self.written_length} is not positive")

    @property
    def plain(self) -> Pairs:
        """The files with their own targets."""
        return Pairs(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Pairs)})

    def content(self) -> list[Any]:
        from llmlab.distill.teacher import digest

        return [*super().content(), digest(self.teacher), repr(self.decoding), self.written_length]

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
        if report is not None:  # minutes, where nothing is written yet
            teacher_texts(self, [source for source, _ in super().read()[0]], report)
        return super().build(
            tokenizer,
            sequence_length=sequence_length,
            batch_size=batch_size,
            seed=seed,
            cache_dir=cache_dir,
            report=report,
        )

    def read(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        train, validation = super().read()
        sources = [source for source, _ in train]
        written = teacher_texts(self, sources)
        return [pair for pair in zip(sources, written, strict=True) if pair[1].strip()], validation


def teacher_texts(
    data: TeacherTexts, sources: Sequence[str], report: Report = lambda done, total, what: None
) -> list[str]:
    """What the teacher writes for each source, from the disk where it was written before.

    Raises:
        FileNotFoundError: there is no teacher.
        ValueError: it is no encoder-decoder.
    """
    from llmlab.distill.teacher import digest

    asked = [digest(data.teacher), repr(data.decoding), data.written_length, data.prefix, list(sources)]
    name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
    folder = default_cache_dir() / "teacher-texts" / name
    parts = range(0, len(sources), _PART)
    missing = [first for first in parts if _read(folder, first) is None]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        write = _writer(data)
        for first in missing:
            report(first, len(sources), "texts of the teacher")
            texts = write(sources[first : first + _PART], first)
            write_json(folder / f"{first:08d}.json", {"texts": texts})
        report(len(sources), len(sources), "texts of the teacher")
    return [text for first in parts for text in _read(folder, first) or []]


def _read(folder: Path, first: int) -> list[str] | None:
    """A part's texts; None where there are none, or not what was written."""
    try:
        texts = json.loads((folder / f"{first:08d}.json").read_bytes())["texts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else None


def _writer(data: TeacherTexts) -> Callable[[Sequence[str], int], list[str]]:
    from llmlab.models.encoder_decoder import EncoderDecoder
    from llmlab.runs import load
    from llmlab.tokenizers import load_tokenizer

    model: Any = load(data.teacher)
    if not isinstance(model.config, EncoderDecoder):
        raise ValueError(
            f"teacher={data.teacher} is a {type(model.config).__name__}, which does not turn a source into a target; "
            "for decoders use Distill(on_policy=OnPolicy(by='teacher'))"
        )
    tokenizer = load_tokenizer(buckets.local(data.teacher))
    frame = _frame(data, tokenizer)

    def write(sources: Sequence[str], first: int) -> list[str]:
        framed = [frame(source) for source in sources]
        rows = data.decoding.write(model, tokenizer, framed, length=data.written_length, first=first)
        return [" ".join(text.split()) for text in tokenizer.decode_batch(rows, skip_special_tokens=True)]

    return write


def _frame(data: TeacherTexts, tokenizer: Any) -> Callable[[str], list[int]]:
    """How the teacher reads a source: as in its own training, where it is a run; else as its tokenizer frames texts."""
    from llmlab.runs import Run, is_hugging_face, locate

    directory, _ = locate(data.teacher)
    if not is_hugging_face(directory) and json.loads((directory / "config.json").read_bytes()).get("data"):
        experiment = Run(directory).experiment
        own, length = experiment.data, experiment.train.sequence_length
        if isinstance(own, Pairs) and length is not None:
            return lambda text: own.framed(tokenizer, tokenizer.encode(own.prefix + text), length)
    return lambda text: tokenizer.encode(data.prefix + text, add_special_tokens=True)
