"""One call for decoders and encoder-decoders: rows, samples, ends, log-probabilities, forms, and no recompilation."""

import json
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.infer import decoding
from llmlab.infer.constraints import JsonSchema, Regex
from llmlab.infer.decoding import Batch, chunks, room
from llmlab.infer.generate import Completion, generate
from llmlab.infer.greedy import greedy
from llmlab.infer.sampling import GREEDY, Sampling
from llmlab.models import bart, clip, flamingo, gemma, llama, paligemma, siglip, t5
from llmlab.models.config import Untied
from llmlab.nn.module import merge, split
from llmlab.tokenizers import Bytes
from tests.drawing import built

TOKENIZER = Bytes().build()
BOS, EOS, VOCAB = 256, 257, TOKENIZER.vocab_size
assert (TOKENIZER.bos_id, TOKENIZER.eos_id) == (BOS, EOS)
_SIZES: dict[str, Any] = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "vocab_size": VOCAB}
LLAMA = replace(llama.llama(**_SIZES, num_kv_heads=1, hidden_dim=24), embedding_std=1.0)
MODEL = LLAMA.build(nnx.Rngs(params=1))
PROMPTS = ["a", "to be or not", "x" * 70, "é"]
SAMPLINGS = [
    replace(GREEDY, logprobs=2),
    Sampling(top_k=20, top_p=0.9, seed=3, logprobs=0),
    Sampling(temperature=0.7, min_p=0.05, repetition_penalty=1.2, seed=4, logprobs=1),
    Sampling(frequency_penalty=0.5, logit_bias=((65, 2.0),), banned_ids=(EOS,), seed=5, logprobs=3),
]


@pytest.mark.parametrize("n", [1, 2])
def test_a_batch_of_n_is_n_batches_of_one_bit_by_bit(n):
    keywords: dict[str, Any] = {"max_new_tokens": 12, "n": n, "deterministic": True, "prompt_logprobs": True}
    together = generate(MODEL, TOKENIZER, PROMPTS, sampling=SAMPLINGS, **keywords)
    alone: list[Completion] = []
    for number, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True)):
        found = generate(MODEL, TOKENIZER, prompt, sampling=sampling, **keywords)
        alone += [replace(completion, prompt=number) for completion in found]
    assert together == alone  # log-probabilities and all
    assert [(c.prompt, c.sample) for c in together] == [(p, s) for p in range(4) for s in range(n)]


@pytest.mark.scale
def test_a_row_writes_the_same_in_any_batch():
    together = generate(MODEL, TOKENIZER, PROMPTS, sampling=SAMPLINGS, max_new_tokens=12, n=2)
    for number, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True)):
        alone = generate(MODEL, TOKENIZER, prompt, sampling=sampling, max_new_tokens=12, n=2)
        assert [c.token_ids for c in alone] == [c.token_ids for c in together if c.prompt == number]
    few = generate(MODEL, TOKENIZER, PROMPTS, sampling=SAMPLINGS, max_new_tokens=12, n=2, max_rows=3)
    assert [c.token_ids for c in few] == [c.token_ids for c in together]


def test_samples_differ_and_the_first_is_that_of_one():
    sampling = Sampling(seed=9)
    several = generate(MODEL, TOKENIZER, "abc", sampling=sampling, n=5, max_new_tokens=8)
    assert len({completion.token_ids for completion in several}) == 5
    assert generate(MODEL, TOKENIZER, "abc", sampling=sampling, max_new_tokens=8)[0] == several[0]


def full_logprobs(ids: list[int]) -> np.ndarray:
    graphdef, params = split(MODEL)
    padded = jnp.array([ids + [0] * (128 - len(ids))])  # one shape for all; causal attention ignores it
    logits = jax.jit(lambda params, ids: merge(graphdef, params)(ids).logits)(params, padded)[0, : len(ids)]
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))


@pytest.mark.parametrize("chunk", [512, 8])
def test_log_probabilities_are_those_of_the_whole_model(monkeypatch, chunk):
    monkeypatch.setattr(decoding, "CHUNK", chunk)
    completions = generate(MODEL, TOKENIZER, PROMPTS, sampling=SAMPLINGS, max_new_tokens=12, prompt_logprobs=True)
    for prompt, sampling, completion in zip(PROMPTS, SAMPLINGS, completions, strict=True):
        given = [BOS, *TOKENIZER.encode(prompt)]
        ids = [*given, *completion.token_ids]
        whole = full_logprobs(ids)
        assert completion.prompt_logprobs is not None
        assert completion.logprobs is not None
        found = [*completion.prompt_logprobs, *completion.logprobs]
        assert found[0] is None
        assert [token.token_id for token in found[1:]] == ids[1:]
        for at, token in enumerate(found[1:]):
            # the same float32 sums in another order, over logits of size one
            np.testing.assert_allclose(token.logprob, whole[at, token.token_id], atol=2e-5)
            best = sorted(range(VOCAB), key=lambda i, at=at: (-whole[at, i], i))[: sampling.logprobs]
            assert [index for index, _ in token.top] == best
        expected = sum(whole[len(given) - 1 + at, token] for at, token in enumerate(completion.token_ids))
        np.testing.assert_allclose(completion.cumulative_logprob, expected, atol=1e-4)


def test_prompts_are_cut_into_few_lengths():
    assert [chunks(length, None) for length in (1, 2, 64, 65, 512)] == [(1,), (64,), (64,), (128,), (512,)]
    assert chunks(513, None) == (512, 64)
    assert chunks(1500, None) == (512, 512, 512)
    assert chunks(550, 560) == (512, 48)  # never beyond the model's positions
    assert chunks(10, 16) == (16,)


def compiled() -> list[int]:
    programs: list[Any] = [decoding._new_state, decoding._prefill, decoding._spread, decoding._first, decoding._decode]
    return [program._cache_size() for program in programs]


def test_nothing_compiles_after_warm_up():
    keywords: dict[str, Any] = {"max_new_tokens": 30, "stop": "zzz"}
    generate(MODEL, TOKENIZER, ["a", "b", "c"], sampling=SAMPLINGS[:3], **keywords)
    before = compiled()
    others = [Sampling(top_p=0.5, repetition_penalty=2.0), Sampling(min_p=0.3, seed=2**40, logprobs=2), GREEDY, GREEDY]
    generate(MODEL, TOKENIZER, ["x" * 30, "", "yy", "z"], sampling=others, stop_ids=(1, 2), **keywords)
    generate(MODEL, TOKENIZER, ["x" * 9, "w", "yy"], sampling=others[1::-1] + others[:1], **keywords)
    assert compiled() == before


def test_the_loop_on_the_device_ends_with_the_last_row(monkeypatch):
    steps: list[int] = []
    more = Batch.more

    def counted(self: Batch, *arguments: Any) -> Any:
        choice, count = more(self, *arguments)
        steps.append(int(count))
        return choice, count

    monkeypatch.setattr(Batch, "more", counted)
    short, long = Sampling(forced_ids=(65, EOS)), Sampling(forced_ids=(65, 66, 67, 68, EOS))
    completions = generate(MODEL, TOKENIZER, ["a", "b", "c"], sampling=[short, long, short], max_new_tokens=100)
    assert steps == [4, 0]  # the second call begins before the first is looked at
    assert [c.text for c in completions] == ["A", "ABCD", "A"]
    assert {(c.finish_reason, c.stop) for c in completions} == {("stop", EOS)}


def test_the_loop_of_gpus_whose_length_is_fixed_writes_the_same(monkeypatch):
    keywords: dict[str, Any] = {"sampling": SAMPLINGS[:3], "max_new_tokens": 12, "stop_ids": tuple(range(60, 90))}
    want = generate(MODEL, TOKENIZER, PROMPTS[:3], **keywords)
    monkeypatch.setattr(decoding, "platform", lambda: "gpu")
    plain = vars(decoding._decode)["__wrapped__"]
    compiled_anew: Any = jax.jit(lambda *arguments: plain(*arguments), static_argnums=(0, 1), donate_argnums=3)
    monkeypatch.setattr(decoding, "_decode", compiled_anew)
    assert generate(MODEL, TOKENIZER, PROMPTS[:3], **keywords) == want
    assert compiled_anew._cache_size() == 1
    assert len({len(completion.token_ids) for completion in want}) > 1, "no row ends before another"


def test_forced_tokens_and_other_ends():
    ends = Sampling(forced_ids=(72, 105), forced_last_id=33, seed=1, banned_ids=(EOS,))
    (completion,) = generate(MODEL, TOKENIZER, "a", sampling=ends, max_new_tokens=5)
    assert completion.token_ids[:2] == (72, 105)
    assert completion.token_ids[-1] == 33
    assert (len(completion.token_ids), completion.finish_reason) == (5, "length")
    (completion,) = generate(MODEL, TOKENIZER, "a", sampling=ends, max_new_tokens=5, stop_ids=(105,))
    assert (completion.token_ids, completion.finish_reason, completion.stop) == ((72,), "stop", 105)


def test_a_stop_string_ends_the_text_across_tokens():
    sampling = Sampling(forced_ids=tuple(b"one END, two"), seed=1)
    pieces: list[str] = []
    keywords: dict[str, Any] = {"sampling": sampling, "max_new_tokens": 30, "stop": ["xyz", "ND,"]}
    (completion,) = generate(
        MODEL, TOKENIZER, "a", stream=lambda number, text: pieces.append(f"{number}{text}"), **keywords
    )
    assert (completion.text, completion.finish_reason, completion.stop) == ("one E", "stop", "ND,")
    assert "".join(piece[1:] for piece in pieces) == "one E"
    assert {piece[0] for piece in pieces} == {"0"}
    assert completion.token_ids == tuple(b"one END,")
    assert generate(MODEL, TOKENIZER, "a", include_stop=True, **keywords)[0].text == "one END,"


_T5 = t5.t5(**_SIZES, head_dim=5, hidden_dim=24, num_buckets=8, max_distance=7, head=Untied())
SEQ2SEQ = {"t5": _T5, "bart": bart.bart(**_SIZES, max_length=64, tied=False)}


@pytest.mark.scale
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_an_encoder_decoder_reads_the_prompt_and_writes_a_target(family):
    model = replace(SEQ2SEQ[family], embedding_std=1.0).build(nnx.Rngs(params=0))
    sources = [[*TOKENIZER.encode(text), EOS] for text in ("ab", "a longer source", "x")]
    expected = greedy(model, sources, max_new_tokens=9, eos_id=EOS, num_tokens=VOCAB)
    written = generate(model, TOKENIZER, sources, sampling=GREEDY, max_new_tokens=9)
    assert [list(completion.token_ids) for completion in written] == expected
    framed = [BOS, *TOKENIZER.encode("ab"), EOS]
    sampling, keywords = Sampling(seed=3, logprobs=0), {"n": 2, "max_new_tokens": 6, "deterministic": True}
    of_text = generate(model, TOKENIZER, ["ab", "a longer source"], sampling=sampling, **keywords)
    assert generate(model, TOKENIZER, [framed], sampling=sampling, **keywords) == of_text[:2]
    with pytest.raises(ValueError, match="a source is not"):
        generate(model, TOKENIZER, "ab", prompt_logprobs=True)


def test_whatever_is_sampled_under_a_constraint_has_its_form():
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": -5, "maximum": 99}, "b": {"enum": ["x", "yé"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    prompts, free = ["p", "q", "r"], Sampling(temperature=2.0, seed=1)
    forms = [JsonSchema.of(schema), Regex("[a-c]{3,6}é?"), None]
    completions = generate(
        MODEL, TOKENIZER, prompts, sampling=free, constraint=forms, n=4, max_new_tokens=40, stop_ids=()
    )
    for completion in completions[:4]:
        value = json.loads(completion.text)
        assert list(value) == ["a", "b"]
        assert -5 <= value["a"] <= 99
        assert value["b"] in ("x", "yé")
    for completion in completions[4:8]:
        assert re.fullmatch("[a-c]{3,6}é?", completion.text)
    assert {completion.finish_reason for completion in completions[:8]} == {"stop"}
    assert len({completion.text for completion in completions[:8]}) > 4
    alone = generate(MODEL, TOKENIZER, "r", sampling=free, n=4, max_new_tokens=40)
    assert [completion.token_ids for completion in alone] == [completion.token_ids for completion in completions[8:]]


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"n": 0}, "n=0"),
        ({"sampling": [GREEDY] * 3}, "3 values for 1 prompts"),
        ({"sampling": Sampling(banned_ids=(300,))}, "names token 300"),
        ({"stop": ""}, "stop string is empty"),
        ({"stop_ids": (900,)}, "id 900"),
        ({"start_id": 3}, "encoder-decoder"),
        ({"inputs": {"pixel_values": np.zeros((2, 4, 4, 3))}}, "2 rows for 1 prompts"),
        ({"inputs": {"pixel_values": np.zeros((1, 4, 4, 3))}}, "tokens alone, not pixel_values"),
        ({"sampling": Sampling(forced_ids=(3,)), "constraint": Regex("a")}, "put them into the constraint"),
    ],
)
def test_what_does_not_fit_is_refused(keywords, words):
    with pytest.raises(ValueError, match=words):
        generate(MODEL, TOKENIZER, "a", **keywords)


def test_no_prompts_no_completions():
    assert generate(MODEL, TOKENIZER, []) == []
    with pytest.raises(ValueError, match="has no tokens"):
        generate(MODEL, TOKENIZER, [[]])


def _tower(make: Any, **more: Any) -> Any:
    return make(embed_dim=12, num_layers=1, num_heads=2, hidden_dim=16, image_size=4, patch_size=2, channels=1, **more)


def images_of(kind: str) -> tuple[Any, np.ndarray]:
    """A model that looks at images, all its gates open, and images for three prompts."""
    if kind == "paligemma":
        text = gemma.gemma(embed_dim=16, num_layers=2, num_heads=2, hidden_dim=24, vocab_size=VOCAB, head_dim=8)
        config = paligemma.PaliGemma(vision=_tower(siglip.siglip, pooled=False), text=text, image_token_id=300)
    else:
        config = flamingo.flamingo(
            **_SIZES, hidden_dim=24, interval=2, vision=_tower(clip.clip_vision), additional_tokens=2
        )
    graphdef, params = split(built(config))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    moved = [leaf + jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32) for leaf in leaves]
    shape = (3, 4, 4, 1) if kind == "paligemma" else (3, 2, 4, 4, 1)
    return merge(graphdef, jax.tree.unflatten(tree, moved)), rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["paligemma", "flamingo"])
def test_a_model_that_sees_images_writes_what_the_whole_model_scores_highest(kind):
    model, pixels = images_of(kind)
    prompts, new, length = ["what", "is in the picture", "a"], 6, 32
    graphdef, params = split(model)
    scores = jax.jit(lambda params, *inputs, **kinds: merge(graphdef, params)(*inputs, **kinds).logits[0, :, :VOCAB])
    keywords: dict[str, Any] = {"sampling": GREEDY, "max_new_tokens": new}
    written = generate(model, TOKENIZER, prompts, inputs={"pixel_values": pixels}, **keywords)
    blank = generate(model, TOKENIZER, prompts, inputs={"pixel_values": 0 * pixels}, **keywords)
    assert [c.token_ids for c in blank] != [c.token_ids for c in written]
    for number, (prompt, completion) in enumerate(zip(prompts, written, strict=True)):
        text = [BOS, *TOKENIZER.encode(prompt)]
        given = [*[300] * 4, *text, *TOKENIZER.encode("\n")] if kind == "paligemma" else text
        ids = [*given, *completion.token_ids]
        padded = jnp.array([ids + [0] * (length - len(ids))])  # what follows changes nothing before
        suffix = (jnp.arange(length)[None] >= len(given)).astype(jnp.int32)
        kinds = {"token_type_ids": suffix} if kind == "paligemma" else {}
        logits = scores(params, padded, jnp.asarray(pixels[number : number + 1]), **kinds)
        best = jnp.argmax(logits[len(given) - 1 : len(given) - 1 + new], axis=-1).tolist()
        assert list(completion.token_ids) == best[: len(completion.token_ids)]
        assert len(completion.token_ids) == new or completion.finish_reason == "stop"


def test_caches_have_little_more_room_than_they_need() -> None:
    for length in (1, 64, 65, 100, 192, 193, 1000, 4097):
        size = room(length, None)
        assert length <= size <= max(64, 1.25 * length + 32)
        assert room(length, 50) == min(50, size)
    assert len({room(length, None) for length in range(1025, 2049)}) == 4
