"""Generation: prompts in, text out, one token at a time; one call for all models that write.

    decoder            continues the prompt
    encoder-decoder    reads the prompt as its source and writes a target
    vision-language    continues the prompt, in which images stand (`inputs`)

Prompts of a call are decoded together, up to `max_rows` rows at a time, those of about one length side by side: reading
the weights is most of a step's time, and a step reads them once for all rows. The programs, and the buckets of static
shapes that let them be compiled once, are in `llmlab.infer.decoding`.

A row's text does not depend on the other rows: neither its random numbers nor what it attends to do. In floating point
that holds to the last bits of the scores, since the order of a sum may change with the number of rows and with the
padding, and now and then two scores are that close. With `deterministic=True` every row runs in a program whose shapes
are its own: always the same number of rows, padding and caches by the row's own length. Then a batch of n is n batches
of one, bit by bit, log-probabilities included; a single prompt pays for idle rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from llmlab.infer.completion import Completion as Completion
from llmlab.infer.completion import Limits, Row, of_given, push_all
from llmlab.infer.completion import TextStream as TextStream
from llmlab.infer.constraints import Constraint, matcher
from llmlab.infer.decoding import Batch, Program, Shape, bucket, one_ahead
from llmlab.infer.prompts import Given, Prompt, listed, read_prompts, stacked
from llmlab.infer.sampling import GREEDY, Choice, Needs, Sampling, SamplingRows, check_vocabulary
from llmlab.infer.steps import Steps, prepare
from llmlab.infer.stopping import GrowingText, check_stop
from llmlab.infer.strategies import Order, Strategy
from llmlab.nn.module import Params
from llmlab.tokenizers import Tokenizer

# Tokens per device call. A streamed burst of 8 still looks continuous, and a row that ends by what the device does not
# know (a stop string) wastes at most two bursts.
_STEPS = 8
# Rows of every program in deterministic mode.
_DETERMINISTIC_ROWS = 8


def generate(
    model: nnx.Module,
    tokenizer: Tokenizer,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | Sequence[Sampling] | None = None,
    n: int = 1,
    stop: str | Sequence[str] | None = None,
    stop_ids: Sequence[int] = (),
    include_stop: bool = False,
    constraint: Constraint | Sequence[Constraint | None] | None = None,
    strategy: Strategy | None = None,
    prompt_logprobs: bool = False,
    inputs: Mapping[str, Array | np.ndarray] | None = None,
    start_id: int | None = None,
    stream: TextStream | None = None,
    max_rows: int = 64,
    cache_dtype: jnp.dtype | type | None = None,
    deterministic: bool = False,
) -> list[Completion]:
    """Continue each prompt, or translate it, as the model does.

    Args:
        model: a decoder, an encoder-decoder or a vision-language model; one that is larger than the device's memory
            through `llmlab.infer.offload`.
        tokenizer: the one it was trained with.
        prompts: one or several, as text or as tokens. Text is continued after the tokenizer's bos token where it has
            one, and an empty one starts from that (or from eos). An encoder-decoder's text gets the tokenizer's own
            frame and ends with eos.
        max_new_tokens: new tokens per prompt at most.
        sampling: how tokens are drawn, for all prompts or one for each; the model's own distribution by default. Equal
            prompts with equal seeds get equal texts: for several, use `n`.
        n: samples of each prompt, which is given to the model once for all of them.
        stop: strings that end a text, which they are not part of.
        stop_ids: tokens that end a text, besides the tokenizer's eos.
        include_stop: keep the stop string at the end of the text.
        constraint: the form that texts must have, for all prompts or one for each (`llmlab.infer.constraints`).
        strategy: another way to write than token by token: `Beams()`, `Contrastive()`, `Speculation()`
            (`llmlab.infer.strategies`).
        prompt_logprobs: report the log-probability of every token of the prompt.
        inputs: what the model is given besides, by the names of its call, with a row for each prompt (`pixel_values`).
        start_id: first token of an encoder-decoder's target; the model's own by default.
        stream: called with every new piece of text as it comes.
        max_rows: rows that are decoded together.
        cache_dtype: storage of keys and values: float32, bfloat16 or int8; that of the parameters by default.
        deterministic: a row's numbers do not depend on the other rows to the last bit; see the module's docstring.

    Returns:
        `n` completions of the first prompt, then of the second, and so on; the best of a beam search first, and fewer
        where it found no more.

    Raises:
        ValueError: a prompt does not fit the model's positions, or there is nothing to start from, or an option names
            what there is not.
        ImportError: a constraint needs llguidance, which is not installed.
    """
    every = listed(prompts)
    if not every:
        return []
    for name, value in (("max_new_tokens", max_new_tokens), ("n", n), ("max_rows", max_rows)):
        if value < 1:
            raise ValueError(f"{name}={value} is not positive")
    steps, params = prepare(model)
    call = _Call(
        steps=steps,
        params=params,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        stop=check_stop(stop),
        stop_ids=_end_ids(tokenizer, stop_ids),
        include_stop=include_stop,
        prompt_logprobs=prompt_logprobs,
        stream=stream,
        cache_dtype=jax.tree.leaves(params)[0].dtype if cache_dtype is None else jnp.dtype(cache_dtype),
    )
    given = read_prompts(steps, tokenizer, every, inputs, start_id)
    call.check(given)
    rules = _one_each("sampling", sampling or Sampling(), Sampling, len(every))
    forms = _one_each("constraint", constraint, (Constraint, type(None)), len(every))
    for rule, form in zip(rules, forms, strict=True):
        check_vocabulary(rule, call.num_tokens)
        if form is not None and (rule.forced_ids or rule.forced_last_id is not None):
            raise ValueError("a constrained text cannot have forced tokens too; put them into the constraint")
    if strategy is not None:
        asked = {
            "constraint": constraint,
            "prompt_logprobs": prompt_logprobs,
            "sampling.logprobs": any(rule.logprobs is not None for rule in rules),
            "cache_dtype": cache_dtype,
            "deterministic": deterministic,
        }
        order = Order(
            given=given,
            inputs=inputs,
            samplings=None if sampling is None else rules,
            n=n,
            max_new_tokens=max_new_tokens,
            stop_ids=call.stop_ids,
            num_tokens=call.num_tokens,
            max_rows=max_rows,
        )
        return list(call.by_strategy(model, strategy, order, [name for name, value in asked.items() if value]))
    jobs = [
        _Job(number * n + sample, number, sample, *of_prompt)
        for number, of_prompt in enumerate(zip(given, rules, forms, strict=True))
        for sample in range(n)
    ]
    completions: dict[int, Completion] = {}
    for group in call.groups(jobs, max_rows, deterministic):
        completions |= {completion.prompt * n + completion.sample: completion for completion in call.run(group)}
    return [completions[number] for number in range(len(jobs))]


@dataclass(frozen=True)
class _Job:
    """One row to decode."""

    number: int
    """Of the completion."""
    prompt: int
    sample: int
    given: Given
    sampling: Sampling
    constraint: Constraint | None


@dataclass(frozen=True)
class _Group:
    """Rows that are decoded together, in which shapes."""

    jobs: Sequence[_Job]
    shape: Shape
    source: int
    """Length that sources are padded to; 0 for none."""
    num_rows: int
    num_prompts: int


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What is the same for all rows of a call."""

    steps: Steps
    params: Params
    tokenizer: Tokenizer
    max_new_tokens: int
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    include_stop: bool
    prompt_logprobs: bool
    stream: TextStream | None
    cache_dtype: jnp.dtype

    @property
    def num_tokens(self) -> int:
        """Ids below are tokens."""
        return min(self.tokenizer.vocab_size, self.steps.num_scores)

    def check(self, given: Sequence[Given]) -> None:
        """Raises ValueError for what does not fit the model's positions."""
        limit = self.steps.max_length
        longest = max(len(one.ids) for one in given)
        if limit is not None and longest >= limit:
            raise ValueError(
                f"the prompt has {longest} tokens and the model has {limit} positions; shorten it to at most "
                f"{limit - 1}"
            )
        source = max(len(one.source or ()) for one in given)
        if limit is not None and source > limit:
            raise ValueError(f"the source has {source} tokens and the model {limit} positions; shorten it to {limit}")
        if self.prompt_logprobs and source:
            raise ValueError(
                "prompt_logprobs are of tokens that the model could have written, which a source is not; leave it out"
            )

    def groups(self, jobs: Sequence[_Job], max_rows: int, deterministic: bool) -> Iterator[_Group]:
        """Rows to decode together: of about one length, or of the very same shapes in deterministic mode."""
        jobs = sorted(jobs, key=lambda job: (len(job.given.source or ()), len(job.given.ids)))  # stable: samples stay
        if not deterministic:
            for first in range(0, len(jobs), max_rows):
                some = jobs[first : first + max_rows]
                prompts = len({job.prompt for job in some})
                yield _Group(some, *self._lengths(some), bucket(len(some), None, 1), bucket(prompts, None, 1))
            return
        shapes: dict[tuple[Shape, int], list[_Job]] = {}
        for job in jobs:
            shapes.setdefault(self._lengths([job]), []).append(job)
        for lengths, some in shapes.items():
            for first in range(0, len(some), _DETERMINISTIC_ROWS):
                rows = some[first : first + _DETERMINISTIC_ROWS]
                yield _Group(rows, *lengths, _DETERMINISTIC_ROWS, _DETERMINISTIC_ROWS)

    def _lengths(self, jobs: Sequence[_Job]) -> tuple[Shape, int]:
        """Static lengths for these rows: of what they continue, and of their sources."""
        limit = self.steps.max_length
        source = max(len(job.given.source or ()) for job in jobs)
        longest = max(len(job.given.ids) for job in jobs)
        # What sees images may see itself in both directions, or needs a mask of all its tokens: it is given at once.
        shape = Shape.of(longest, self.max_new_tokens, limit, whole=any(job.given.inputs for job in jobs))
        return shape, bucket(source, limit) if source else 0

    def run(self, group: _Group) -> Iterator[Completion]:
        """Decodes the rows of a group."""
        rows, batch = [self._row(job) for job in group.jobs], self._batch(group)
        push_all(rows, jax.device_get(batch.first(self._allowed(rows, group))))
        constrained = any(row.matcher for row in rows)  # must see every token before the next
        bursts = self._bursts(batch, rows, group, 1 if constrained else _STEPS)
        for choices, count in bursts if constrained else one_ahead(bursts):
            choices, count = jax.device_get((choices, count))
            for step in range(count):
                push_all(rows, jax.tree.map(lambda leaf, at=step: leaf[at], choices))
        numbers = {job.prompt: number for number, job in enumerate(_prompts(group.jobs))}
        for job, row in zip(group.jobs, rows, strict=True):
            of_prompt = None
            if self.prompt_logprobs:
                of_prompt = of_given(batch.given, numbers[job.prompt], job.given.ids, job.sampling.logprobs or 0)
            yield replace(row.completion(job.prompt, job.sample), prompt_logprobs=of_prompt)

    def by_strategy(
        self, model: nnx.Module, strategy: Strategy, order: Order, more: Sequence[str]
    ) -> Iterator[Completion]:
        """The texts of all prompts, with stop strings found in them; `more` is what else was asked for."""
        if more:
            raise ValueError(
                f"{type(strategy).__name__} knows nothing of {', '.join(more)}; leave out one or the other"
            )
        for number, found in enumerate(strategy.write(model, order)):
            for sample, one in enumerate(found):
                job = _Job(number * order.n + sample, number, sample, order.given[number], Sampling(), None)
                row = self._row(job)
                row.extend(one.token_ids, lambda _: None)
                yield replace(row.completion(number, sample), score=one.score)

    def _bursts(
        self, batch: Batch, rows: Sequence[Row], group: _Group, steps: int
    ) -> Iterator[tuple[Choice, jax.Array]]:
        """Further tokens, as many as may be written, until all rows have ended."""
        for _ in range(0, self.max_new_tokens - 1, steps):
            if all(row.reason for row in rows):
                return
            done_B = np.ones(group.num_rows, bool)
            done_B[: len(rows)] = [bool(row.reason) for row in rows]
            yield batch.more(steps, done_B, self._allowed(rows, group))

    def _row(self, job: _Job) -> Row:
        limit = self.steps.max_length
        return Row(
            job.number,
            GrowingText(
                self.tokenizer,
                self.stop,
                include_stop=self.include_stop,
                after=job.given.ids if job.given.source is None else (),
            ),
            Limits(
                frozenset(self.stop_ids),
                self.max_new_tokens,
                None if limit is None else limit - len(job.given.ids) + 1,  # the last one is not given to the model
            ),
            top=job.sampling.logprobs,
            stream=self.stream,
            matcher=None if job.constraint is None else matcher(job.constraint, self.tokenizer),
        )

    def _batch(self, group: _Group) -> Batch:
        jobs, limit = group.jobs, self.steps.max_length
        prompts = _prompts(jobs)
        idle = group.num_rows - len(jobs)
        numbers = {job.prompt: number for number, job in enumerate(prompts)}
        starts = [len(job.given.ids) for job in jobs]
        most = [start + self.max_new_tokens - 1 for start in starts]
        rules = [job.sampling for job in jobs]
        needs = Needs.of(rules, allowed=any(job.constraint for job in jobs))
        return Batch(
            program=Program(self.steps, needs, self.num_tokens),
            params=self.params,
            prompts=[job.given.ids for job in prompts],
            prompt_of=[numbers[job.prompt] for job in jobs],
            rows=SamplingRows.of(
                [*rules, *[GREEDY] * idle],
                samples=[*(job.sample for job in jobs), *[0] * idle],
                starts=[*starts, *[1] * idle],
                lasts=[*(most if limit is None else [min(last, limit) for last in most]), *[0] * idle],
            ),
            shape=group.shape,
            num_prompts=group.num_prompts,
            stop_ids=self.stop_ids,
            inputs=stacked([job.given for job in prompts], group.num_prompts, sum(group.shape.chunks), group.source),
            dtype=self.cache_dtype,
            prompt_logprobs=(needs.logprobs or 0) if self.prompt_logprobs else None,
        )

    def _allowed(self, rows: Sequence[Row], group: _Group) -> np.ndarray | None:
        """Bitmask of the tokens that constraints allow; everything for rows without, and for rows that have ended."""
        if not any(row.matcher for row in rows):
            return None
        allowed_BW = np.full((group.num_rows, -(-self.tokenizer.vocab_size // 32)), -1, np.int32)
        for number, row in enumerate(rows):
            if row.matcher is not None and not row.reason:
                allowed_BW[number] = row.matcher.allowed()
        return allowed_BW


def _prompts(jobs: Sequence[_Job]) -> list[_Job]:
    """The first row of every prompt."""
    first: dict[int, _Job] = {}
    for job in jobs:
        first.setdefault(job.prompt, job)
    return list(first.values())


def _one_each(name: str, value: Any, kind: Any, count: int) -> list[Any]:
    """A value for each prompt: one for all, or as many as there are."""
    if isinstance(value, kind):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values for {count} prompts; give one for all, or one for each")
    return list(value)


def _end_ids(tokenizer: Tokenizer, stop_ids: Sequence[int]) -> tuple[int, ...]:
    for index in stop_ids:
        tokenizer.id_to_token(index)  # raises for an id that the vocabulary does not have
    eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    return tuple(dict.fromkeys([*eos, *map(int, stop_ids)]))


def generate_ids(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    num_tokens: int | None = None,
    cache_dtype: jnp.dtype | type | None = None,
) -> Iterator[np.ndarray]:
    """The next token of every row, again and again: int arrays of shape (rows,), `max_new_tokens` of them.

    What ends a sequence is the caller's to decide; tokens of a row whose model has no more positions mean nothing. Only
    ids below `num_tokens` are drawn: a model's vocabulary is rounded up, and its last rows are no tokens. Keys and
    values are stored in `cache_dtype`, by default that of the parameters.
    """
    sampling = sampling or Sampling()
    steps, params = prepare(model)
    rows, limit = len(prompts), steps.max_length
    num_rows = bucket(rows, None, 1)
    starts = [len(prompt) for prompt in prompts] + [1] * (num_rows - rows)
    lasts = [start + max_new_tokens - 1 for start in starts]
    batch = Batch(
        program=Program(steps, Needs.of([sampling]), num_tokens),
        params=params,
        prompts=prompts,
        prompt_of=range(rows),
        rows=SamplingRows.of(
            [sampling] * num_rows,
            starts=starts,
            lasts=lasts if limit is None else [min(last, limit) for last in lasts],
        ),
        shape=Shape.of(max(starts), max_new_tokens, limit),
        num_prompts=num_rows,
        dtype=jax.tree.leaves(params)[0].dtype if cache_dtype is None else jnp.dtype(cache_dtype),
    )
    last_B = np.asarray(batch.first().token_B)[:rows]
    yield last_B
    going_B, remaining = np.zeros(num_rows, bool), max_new_tokens - 1
    for choices, count in one_ahead(batch.more(_STEPS, going_B) for _ in range(0, remaining, _STEPS)):
        written = int(count)
        for token_B in np.asarray(choices.token_B)[: min(written, remaining), :rows]:
            last_B, remaining = token_B, remaining - 1
            yield last_B
        if written < _STEPS:  # the positions of all rows have ended
            break
    yield from [last_B] * remaining
