"""Embeddings of every kind of model are means over real tokens, whatever is padded beside them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.infer.server.embedder import Embedder
from llmlab.models.bert import bert
from llmlab.models.llama import llama
from llmlab.models.t5 import t5
from llmlab.nn.module import merge, split
from llmlab.tokenizers import Bytes
from tests.drawing import built
from tests.infer.server.serving import client_of, service_of

TOKENIZER = Bytes().build()
SIZE = TOKENIZER.vocab_size
MODELS = {
    "encoder": bert(embed_dim=16, num_layers=2, num_heads=2, hidden_dim=24, vocab_size=SIZE, max_length=48),
    "decoder": llama(embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=24, vocab_size=SIZE),
    "encoder-decoder": t5(embed_dim=16, num_layers=2, num_heads=2, hidden_dim=24, vocab_size=SIZE),
}
TEXTS = ["b", "a text", "another text that is longer than both", "c"] + [f"text {number:02}" for number in range(15)]


def states(model: Any, rows: list[list[int]]) -> list[np.ndarray]:
    """The last states of every text alone, without padding."""
    graphdef, params = split(model)

    @jax.jit
    def alone(params: Any, row: jax.Array) -> jax.Array:
        one = merge(graphdef, params)
        return (one.encode(row, None) if hasattr(one, "encode") else one.hidden_states(row)).states[0]

    return [np.asarray(alone(params, jnp.asarray([row]))) for row in rows]


@pytest.mark.parametrize("kind", MODELS)
def test_a_vector_is_the_normalised_mean_of_the_states_of_the_text_alone(kind: str) -> None:
    model = built(MODELS[kind])
    embedder = Embedder(model, TOKENIZER)
    rows = embedder.encode(TEXTS)
    means = np.stack([of_row.mean(axis=0) for of_row in states(model, rows)])
    expected = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(embedder.embed(rows), expected, rtol=0, atol=2e-6)


def test_a_model_that_does_not_write_has_embeddings_alone() -> None:
    model = built(MODELS["encoder"])
    client = client_of(service_of(None, tokenizer=TOKENIZER, embedder=Embedder(model, TOKENIZER)))
    answer = client.post("/v1/embeddings", json={"input": ["a", "b"]}).json()
    assert [len(one["embedding"]) for one in answer["data"]] == [16, 16]
    for path, body in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": []})):
        response = client.post(f"/v1/{path}", json=body)
        assert response.status_code == 400
        assert "does not write text" in response.json()["error"]["message"]
    long = client.post("/v1/embeddings", json={"input": "a" * 100})
    assert long.json()["error"]["code"] == "context_length_exceeded"
    assert client.get("/v1/models").json()["data"][0]["max_model_len"] is None
    assert "llmlab_requests_active 0.0" in client.get("/metrics").text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": [SIZE]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "dimensions": 3}, "dimensions"),
        ({"input": "a", "inputs": "b"}, "inputs"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    model = built(MODELS["encoder"])
    client = client_of(service_of(None, tokenizer=TOKENIZER, embedder=Embedder(model, TOKENIZER)))
    response = client.post("/v1/embeddings", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
