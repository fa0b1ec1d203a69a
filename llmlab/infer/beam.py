"""Beam search: the sequences that the model finds most probable, as far as a few prefixes at a time can tell.

    score(y) = log p(y | x) / |y|^a             |y| counts the new tokens with their end; a is `length_penalty`

Finding the best of V^n sequences is out of reach, and greedy decoding commits to each token at once. Beam search keeps
the `num_beams` best prefixes: at every step each is continued by every token, those continuations that end are put
aside as hypotheses, the best of the others live on. It costs `num_beams` times what greedy decoding does, and the
order of the cache's rows changes at every step. A beam as wide as there are prefixes is exhaustive search.

Log-probabilities only fall as a sequence grows, so the plain sum (a = 0) prefers short ones, often the empty one: of
translation models it is the most probable sequence for half of all sentences (Stahlberg and Byrne 2019, 1908.10090).
Dividing by a power of the length (Wu et al. 2016, 1609.08144, section 7; here the simple power that transformers uses)
makes up for it. With it a longer sequence can still win, so when is a search over? `early_stopping`, as transformers
has it:

    True      when there are `num_beams` hypotheses
    False     when moreover no living prefix, scored as it stands, beats the worst of them: a heuristic where a > 0
    "never"   when none could beat it at any length up to `max_new_tokens`: what is found is what full search finds

Diverse beam search (Vijayakumar et al. 2016, 1610.02424): beams of one search differ in a word or two. In `num_groups`
groups that search one after the other within each step, a group pays `diversity_penalty` for every beam of the groups
before it that has just written the same token (Hamming diversity). As there, the payments are part of the score.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llmlab.infer.rows import Rows, Start, batches, bucket, chosen_tokens, vocabulary
from llmlab.infer.steps import Inputs, Steps, prepare
from llmlab.nn.module import Params


@dataclass(frozen=True)
class Hypothesis:
    """A sequence that beam search found."""

    token_ids: tuple[int, ...]
    """The new tokens, without the one that ended them."""
    score: float
    """What hypotheses are ranked by: log-probability, less payments for diversity, over length**length_penalty."""
    log_probability: float
    """Of the new tokens and their end, given the prompt; nats."""
    finish_reason: str
    """"stop" at an end token, "length" at max_new_tokens."""


def beam_search(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
    num_groups: int = 1,
    diversity_penalty: float = 0.0,
    eos_id: int | Sequence[int] | None = None,
    banned_ids: Sequence[int] = (),
    min_new_tokens: int = 0,
    num_tokens: int | None = None,
    start_ids: Sequence[Start] | None = None,
    inputs: Inputs | None = None,
    batch_size: int | None = None,
) -> list[list[Hypothesis]]:
    """The best sequences after each prompt, best first.

    Args:
        model: a decoder or an encoder-decoder.
        prompts: tokens to continue; for an encoder-decoder, sources.
        max_new_tokens: longest result, its end included.
        num_beams: prefixes that live, of all groups together.
        length_penalty: power of the length that a log-probability is divided by: 0 prefers short sequences.
        early_stopping: when a search is over; see the module's docstring.
        num_return_sequences: hypotheses returned for each prompt; fewer where there are not as many sequences.
        num_groups: groups of beams that are to differ.
        diversity_penalty: what a token costs for each beam of earlier groups that has just written it, in nats.
        eos_id: token or tokens that end a sequence.
        banned_ids: tokens that are never written.
        min_new_tokens: an end is not written before so many other tokens.
        num_tokens: only ids below are written: a model's vocabulary is rounded up, and its last rows are no tokens.
        start_ids: for an encoder-decoder, what each target begins with; None for the model's own start token.
        inputs: what the model is given besides the prompts (images), a row for each prompt.
        batch_size: prompts that are searched together, those of about one length; None for all.

    Raises:
        ValueError: numbers that make no search, or a row that does not fit the model's positions.
    """
    _check(num_beams, num_return_sequences, num_groups, diversity_penalty, early_stopping)
    steps, params = prepare(model)
    num_tokens = vocabulary(steps, num_tokens)
    rules = _Rules(
        end_V=chosen_tokens(num_tokens, eos_id, "eos_id"),
        banned_V=chosen_tokens(num_tokens, banned_ids, "banned_ids"),
        min_new_tokens=min_new_tokens,
        max_new_tokens=max_new_tokens,
        length_penalty=float(length_penalty),
        diversity_penalty=float(diversity_penalty),
        stops_when_full=early_stopping is True,
        # Longer scores better only where a log-probability is divided by more.
        hopes_for_length=early_stopping == "never" and length_penalty > 0,
    )
    # Each beam has at most so many continuations that end: among one more, as many beams live on as there were.
    per_beam = min(max(2, 1 + int(np.sum(rules.end_V))), num_tokens)
    form = _Form(num_groups, num_beams // num_groups, per_beam, bucket(max_new_tokens))
    found: list[list[Hypothesis]] = [[] for _ in prompts]
    for rows in batches(
        steps, prompts, max_new_tokens=max_new_tokens, start_ids=start_ids, inputs=inputs, batch_size=batch_size
    ):
        finished = jax.tree.map(np.asarray, _search(steps, form, params, rows, rules))
        for row, number in enumerate(rows.number_B):
            hypotheses = _hypotheses(jax.tree.map(lambda leaf, row=row: leaf[row], finished), rules.end_V)
            found[number] = hypotheses[:num_return_sequences]
    return found


def _check(
    num_beams: int, num_return_sequences: int, num_groups: int, diversity_penalty: float, early_stopping: bool | str
) -> None:
    if num_beams < 1:
        raise ValueError(f"num_beams={num_beams} is not positive; 1 is greedy decoding, 4 is usual")
    if not 1 <= num_return_sequences <= num_beams:
        raise ValueError(
            f"num_return_sequences={num_return_sequences} is not in 1..{num_beams}: a search returns at most as many "
            "sequences as it has beams; raise num_beams"
        )
    if num_groups < 1 or num_beams % num_groups:
        raise ValueError(f"num_beams={num_beams} are not num_groups={num_groups} groups of one size; change one")
    if diversity_penalty < 0 or (diversity_penalty > 0 and num_groups == 1):
        raise ValueError(
            f"diversity_penalty={diversity_penalty} with num_groups={num_groups}: the penalty is not negative, and "
            "only groups pay it, to those before them; use num_groups=num_beams"
        )
    if early_stopping not in (True, False, "never"):
        raise ValueError(f'early_stopping={early_stopping!r} is none of True, False and "never"')


@dataclass(frozen=True)
class _Form:
    """What a compiled search is made for."""

    num_groups: int
    group_size: int
    candidates_per_beam: int
    room: int
    """New tokens that there is room for."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Rules:
    """What may change without another compilation."""

    end_V: Any
    banned_V: Any
    min_new_tokens: Any
    max_new_tokens: Any
    length_penalty: Any
    diversity_penalty: Any
    stops_when_full: Any
    hopes_for_length: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Sequences:
    """Prefixes that live, or hypotheses; W of each group G of each prompt B, best first."""

    token_BGWN: Int[Array, "B G W N"]
    """New tokens; beyond the length they mean nothing."""
    length_BGW: Int[Array, "B G W"]
    score_BGW: Float[Array, "B G W"]
    """Of a prefix, its log-probability less its payments; of a hypothesis, its score. -inf where there is none."""
    log_probability_BGW: Float[Array, "B G W"]

    def take(self, index_BGW: Int[Array, "B G X"]) -> "_Sequences":
        """These of each group, in this order."""

        def one(leaf: jax.Array) -> jax.Array:
            index = index_BGW.reshape(*index_BGW.shape, *(1,) * (leaf.ndim - 3))
            return jnp.take_along_axis(leaf, index, axis=2)

        return jax.tree.map(one, self)


_Progress = tuple[_Sequences, _Sequences, Bool[Array, "B G"]]
"""A search between two steps: prefixes that live, hypotheses, and which groups are not over."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def _search(steps: Steps, form: _Form, params: Params, rows: Rows, rules: _Rules) -> _Sequences:
    """The hypotheses of all groups of every prompt."""
    rows, rules = jax.tree.map(jnp.asarray, (rows, rules))
    batch, given = rows.token_BS.shape
    beams = form.num_groups * form.group_size
    # Row b * beams + k of the state is beam k of prompt b.
    prompt_R = jnp.repeat(jnp.arange(batch), beams)
    state = steps.new_state(batch, given + form.room, jax.tree.leaves(params)[0].dtype, rows.inputs)
    hidden_BSD, state = steps.prefill(params, state, rows.token_BS, rows.position_BS, rows.inputs)
    last_BD = hidden_BSD[jnp.arange(batch), rows.length_B - 1]
    shape = (batch, form.num_groups, form.group_size)
    none = jnp.full(shape, -jnp.inf)
    empty = _Sequences(jnp.zeros((*shape, form.room), jnp.int32), jnp.zeros(shape, jnp.int32), none, none)
    # One prefix to begin with, the empty one.
    living = replace(empty, score_BGW=none.at[..., 0].set(0.0), log_probability_BGW=none.at[..., 0].set(0.0))
    open_BG = jnp.ones(shape[:2], bool)

    def advance(count: jax.Array, hidden_RD: jax.Array, search: _Progress) -> tuple[jax.Array, _Progress]:
        log_RV = jax.nn.log_softmax(steps.project(params, hidden_RD)[:, : len(rules.end_V)], axis=-1)
        return _advance(form, rules, count, log_RV.reshape(*shape, -1), search)

    def unfinished(carry: Any) -> jax.Array:
        count, _, _, (_, _, open_BG) = carry
        return (count < rules.max_new_tokens) & jnp.any(open_BG)

    def step(carry: Any) -> Any:
        count, state, source_R, search = carry
        token_R = search[0].token_BGWN.reshape(batch * beams, -1)[:, count - 1]
        position_R = rows.length_B[prompt_R] + count - 1
        hidden_RSD, state = steps.step(params, state.take(source_R), token_R[:, None], position_R[:, None])
        source_BGW, search = advance(count, hidden_RSD[:, 0], search)
        return count + 1, state, _state_rows(source_BGW), search

    _, search = advance(jnp.asarray(0, jnp.int32), last_BD[prompt_R], (living, empty, open_BG))
    # All beams come from the one prefix that there was, so all rows of a prompt are the same at first.
    start = (jnp.asarray(1, jnp.int32), state.take(prompt_R), jnp.arange(batch * beams), search)
    return jax.lax.while_loop(unfinished, step, start)[3][1]


def _state_rows(source_BGW: Int[Array, "B G W"]) -> Int[Array, "R"]:
    """Rows of the state that beams go on from, given which beam of its group each continues."""
    batch, groups, width = source_BGW.shape
    first_BG1 = width * jnp.arange(batch * groups).reshape(batch, groups, 1)
    return (first_BG1 + source_BGW).reshape(-1)


def _advance(
    form: _Form, rules: _Rules, count: Int[Array, ""], log_BGWV: Float[Array, "B G W V"], search: _Progress
) -> tuple[Int[Array, "B G W"], _Progress]:
    """One step of every search: each living prefix gets a token more.

    Args:
        form: of the search.
        rules: of the search.
        count: new tokens that each living prefix has.
        log_BGWV: log-probabilities of its next one.
        search: before the step.

    Returns:
        Which prefix of its group each of the new ones continues, and the search after the step.
    """
    living, finished, open_BG = search
    forbidden_V = rules.banned_V | (rules.end_V & (count < rules.min_new_tokens))
    log_BGWV = jnp.where(forbidden_V, -jnp.inf, log_BGWV)
    index_BGC, score_BGC, alive_BGW = _choose(form, rules, log_BGWV, living.score_BGW)
    source_BGC, token_BGC = jnp.divmod(index_BGC, log_BGWV.shape[-1])
    before = living.take(source_BGC)
    candidates = _Sequences(
        before.token_BGWN.at[..., count].set(token_BGC),
        before.length_BGW + 1,
        score_BGC,
        before.log_probability_BGW + jnp.take_along_axis(log_BGWV.reshape(*open_BG.shape, -1), index_BGC, axis=2),
    )
    best = jax.tree.map(lambda leaf: leaf[:, :, : form.group_size], candidates)
    finished = _finish(rules, best, finished, open_BG)
    living = candidates.take(alive_BGW)
    # Where there are fewer candidates that go on than beams, the places left are taken by some that end.
    ends_BGW = rules.end_V[jnp.take_along_axis(token_BGC, alive_BGW, axis=2)]
    living = replace(living, score_BGW=jnp.where(ends_BGW, -jnp.inf, living.score_BGW))
    open_BG = open_BG & _can_improve(rules, count + 1, living, finished)
    return jnp.take_along_axis(source_BGC, alive_BGW, axis=2), (living, finished, open_BG)


def _choose(
    form: _Form, rules: _Rules, log_BGWV: Float[Array, "B G W V"], score_BGW: Float[Array, "B G W"]
) -> tuple[Int[Array, "B G C"], Float[Array, "B G C"], Int[Array, "B G W"]]:
    """The best continuations of each group, best first, and which of them live on.

    Returns:
        Number of each candidate, W * V of them in all; its score; the places among the candidates of the new prefixes.
    """
    batch, _, width, vocab = log_BGWV.shape

    def group(used_BV: jax.Array, of_group: tuple[jax.Array, jax.Array]) -> Any:
        log_BWV, score_BW = of_group
        total_BWV = score_BW[..., None] + log_BWV - rules.diversity_penalty * used_BV[:, None]
        score_BC, index_BC = jax.lax.top_k(total_BWV.reshape(batch, -1), width * form.candidates_per_beam)
        token_BC = index_BC % vocab
        alive_score_BW, alive_BW = jax.lax.top_k(jnp.where(rules.end_V[token_BC], -jnp.inf, score_BC), width)
        written_BW = jnp.take_along_axis(token_BC, alive_BW, axis=1)
        lives_BW = (alive_score_BW > -jnp.inf).astype(used_BV.dtype)
        used_BV = used_BV.at[jnp.arange(batch)[:, None], written_BW].add(lives_BW)
        return used_BV, (index_BC, score_BC, alive_BW)

    groups_first = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), (log_BGWV, score_BGW))
    chosen = jax.lax.scan(group, jnp.zeros((batch, vocab), log_BGWV.dtype), groups_first)[1]
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), chosen)


def _finish(rules: _Rules, best: _Sequences, finished: _Sequences, open_BG: Bool[Array, "B G"]) -> _Sequences:
    """The best hypotheses, those among a group's `group_size` best candidates that end now included.

    A candidate that ends but ranks lower makes room for no prefix, and would not have been looked at by a search that
    keeps only so many.
    """
    last_BGW = jnp.take_along_axis(best.token_BGWN, best.length_BGW[..., None] - 1, axis=-1)[..., 0]
    ends_BGW = (rules.end_V[last_BGW] | (best.length_BGW >= rules.max_new_tokens)) & open_BG[..., None]
    score_BGW = best.score_BGW / best.length_BGW**rules.length_penalty
    best = replace(best, score_BGW=jnp.where(ends_BGW, score_BGW, -jnp.inf))
    both = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=2), finished, best)
    return both.take(jax.lax.top_k(both.score_BGW, finished.score_BGW.shape[2])[1])


def _can_improve(rules: _Rules, count: Int[Array, ""], living: _Sequences, finished: _Sequences) -> Bool[Array, "B G"]:
    """Whether a living prefix of `count` new tokens may become one of a group's best hypotheses."""
    full_BG = jnp.all(finished.score_BGW > -jnp.inf, axis=-1)
    best_BG = living.score_BGW[..., 0]
    length = jnp.where(rules.hopes_for_length, rules.max_new_tokens, count)
    improves_BG = best_BG / length**rules.length_penalty > jnp.min(finished.score_BGW, axis=-1)
    return (best_BG > -jnp.inf) & (~full_BG | (improves_BG & ~rules.stops_when_full))


def _hypotheses(finished: _Sequences, end_V: np.ndarray) -> list[Hypothesis]:
    """What the groups of one prompt found, best first."""
    found = []
    for group, place in np.ndindex(finished.score_BGW.shape):
        tokens = finished.token_BGWN[group, place, : finished.length_BGW[group, place]].tolist()
        score, log_probability = finished.score_BGW[group, place], finished.log_probability_BGW[group, place]
        if score > -np.inf:
            ended = bool(end_V[tokens[-1]])
            reason = "stop" if ended else "length"
            ids = tuple(tokens[:-1] if ended else tokens)
            found.append(Hypothesis(ids, float(score), float(log_probability), reason))
    return sorted(found, key=lambda hypothesis: -hypothesis.score)
