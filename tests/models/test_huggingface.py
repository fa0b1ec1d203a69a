"""Hugging Face directories: what llmlab computes with them is what transformers computed when they were written."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmlab.models import gpt2, llama
from llmlab.models.config import Tied, Transformer
from llmlab.models.huggingface import load_hf, save_hf
from llmlab.models.weights import flatten
from llmlab.nn.module import merge, split
from llmlab.nn.norms import LayerNorm
from llmlab.nn.wiring import Sandwich
from llmlab.sharding import Mesh
from tests.drawing import built
from tests.models.comparison import assert_same_weights, under, weights_of
from tests.models.references import FIXTURES

CASES = sorted(path.name for path in FIXTURES.iterdir())
ROPE_CASES = [case for case in CASES if "-rope-" in case]


def copied(case: str, directory: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / case, directory / case))


def edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(directory: Path, edit: Any) -> None:
    tensors = dict(load_file(directory / "model.safetensors"))
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("case", ROPE_CASES)
def test_rotary_scaling_changes_its_fixture(case):
    values = load_file(FIXTURES / case / "reference.safetensors")
    inputs = under("input", values)
    config = json.loads((FIXTURES / case / "config.json").read_text())
    plain = llama.from_hf({**config, "rope_parameters": None, "rope_scaling": None, "rope_theta": 100.0})
    model = merge(plain.abstract()[0], split(load_hf(FIXTURES / case))[1])
    logits = model(jnp.asarray(inputs["input_ids"]), jnp.asarray(inputs["attention_mask"])).logits
    real = inputs["attention_mask"] == 1
    # otherwise equality above would say nothing about the scaling
    assert np.max(np.abs(np.asarray(logits)[real] - values["output.logits"][real])) > 1e-2


def test_shards_with_an_index_hold_the_same_model(tmp_path):
    model = load_hf(FIXTURES / "llama")
    save_hf(model, tmp_path, max_shard_bytes=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert {file.name for file in files} == set(index["weight_map"].values())
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert max(sizes) <= 4000
    assert_same_weights(load_hf(tmp_path), model)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    save_hf(load_hf(FIXTURES / "llama"), tmp_path, max_shard_bytes=1)
    assert {len(load_file(file)) for file in tmp_path.glob("*.safetensors")} == {1}
    assert_same_weights(load_hf(tmp_path), load_hf(FIXTURES / "llama"))


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_half_precision_weights_convert_without_loss(dtype, tmp_path):
    directory = copied("gpt2", tmp_path)
    edit_tensors(directory, lambda tensors: tensors.update({k: v.astype(dtype) for k, v in tensors.items()}))
    halved = weights_of(load_hf(directory))
    for name, leaf in weights_of(load_hf(FIXTURES / "gpt2")).items():
        assert halved[name].dtype == np.float32
        np.testing.assert_array_equal(halved[name], leaf.astype(dtype).astype(np.float32))


def test_a_pattern_with_remainder_exports_the_layers_in_their_order(tmp_path):
    def build(repeats: int) -> Transformer:
        config = llama.llama(embed_dim=8, num_layers=5, num_heads=2, hidden_dim=8, vocab_size=11)
        return dataclasses.replace(config, pattern=config.pattern * repeats)

    paired = built(build(2))
    directory = save_hf(paired, tmp_path / "pairs")
    single = load_hf(directory)
    assert len(single.config.pattern) == 1
    ours, theirs = flatten(split(paired)[1]), flatten(split(single)[1])
    for layer, location in enumerate(["blocks.0", "blocks.1"] * 2 + ["remainder.0"]):
        kernel = ours[f"stack.{location}.mixer.query.kernel"]
        kernel = kernel if layer == 4 else kernel[layer // 2]
        np.testing.assert_array_equal(kernel, theirs["stack.blocks.0.mixer.query.kernel"][layer])
    ids = jnp.arange(6)[None]
    np.testing.assert_allclose(paired(ids).logits, single(ids).logits, rtol=1e-5, atol=1e-6)


def test_names_without_the_model_prefix_and_old_buffers_are_understood(tmp_path):
    directory = copied("gpt2", tmp_path)

    def edit(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.float32))
        tensors["h.1.attn.masked_bias"] = np.full((), -1e4, np.float32)

    edit_tensors(directory, edit)
    assert_same_weights(load_hf(directory), load_hf(FIXTURES / "gpt2"))


def test_a_tied_head_in_the_file_must_equal_the_embedding(tmp_path):
    directory = copied("gpt2", tmp_path)
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].copy()}))
    assert_same_weights(load_hf(directory), load_hf(FIXTURES / "gpt2"))
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] * 2}))
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to transformer\.wte\.weight"):
        load_hf(directory)


def test_a_tied_head_may_stand_in_for_the_embedding(tmp_path):
    directory = copied("gpt2", tmp_path)
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))
    assert_same_weights(load_hf(directory), load_hf(FIXTURES / "gpt2"))


def test_every_misfit_of_the_weights_is_in_one_error(tmp_path):
    directory = copied("llama", tmp_path)

    def edit(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((3, 16), np.float32)
        tensors["model.layers.1.input_layernorm.weight"] = np.ones(16, np.int32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
        tensors["model.layers.2.input_layernorm.weight"] = np.ones(16, np.float32)

    edit_tensors(directory, edit)
    with pytest.raises(ValueError, match="6 problems") as error:
        load_hf(directory)
    assert sorted(str(error.value).splitlines()[1:]) == [
        "  missing: model.layers.1.mlp.up_proj.weight, shape (24, 16)",
        "  missing: model.norm.weight, shape (16,)",
        "  unexpected: model.layers.0.self_attn.q_proj.bias, shape (16,)",
        "  unexpected: model.layers.2.input_layernorm.weight, shape (16,)",
        "  wrong shape: model.layers.0.self_attn.q_proj.weight is (3, 16), the config asks for (16, 16)",
        "  wrong type: model.layers.1.input_layernorm.weight is I32, parameters are read from F32, F16, BF16",
    ]


def test_misfits_are_found_before_any_weight_is_read(tmp_path):
    directory = copied("llama", tmp_path)
    edit_config(directory, vocab_size=10**9)  # a table of 64 GB, if it were allocated
    with pytest.raises(ValueError, match=r"wrong shape: model\.embed_tokens\.weight is \(53, 16\)"):
        load_hf(directory)


def test_every_attribute_that_is_not_implemented_is_in_one_error():
    config = json.loads((FIXTURES / "llama" / "config.json").read_text())
    bad = {
        "hidden_act": "laplace",
        "rope_scaling": {"rope_type": "longrope", "factor": 2.0},
        "sliding_window": 4096,
        "quantization_config": {"bits": 4},
        "hidden_size": "big",
        "architectures": ["LlamaForSequenceClassification"],
    }
    with pytest.raises(ValueError, match="llama config") as error:
        llama.from_hf({**config, **bad})
    for word in ("laplace", "longrope", "sliding_window", "quantization_config", "hidden_size", "SequenceClass"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True), ("n_ctx", 8), ("rotary_dim", 4)],
)
def test_gpt2_attributes_that_change_the_computation_are_refused(attribute, value):
    config = json.loads((FIXTURES / "gpt2" / "config.json").read_text())
    with pytest.raises(ValueError, match=attribute):
        gpt2.from_hf({**config, attribute: value})


def test_attributes_that_change_nothing_are_accepted():
    config = json.loads((FIXTURES / "gpt2" / "config.json").read_text())
    changes = {"_name_or_path": "gpt2", "use_cache": False, "task_specific_params": {"a": 1}, "n_ctx": 16}
    assert gpt2.from_hf({**config, **changes}) == gpt2.from_hf(config)


def test_what_a_model_has_beyond_its_family_is_refused_with_every_difference(tmp_path):
    config = llama.llama(embed_dim=8, num_layers=2, num_heads=2, hidden_dim=8, vocab_size=11)
    block = dataclasses.replace(config.pattern[0], wiring=Sandwich(), dropout=0.1)
    model = built(dataclasses.replace(config, pattern=(block,), embedding_scale=2.0))
    with pytest.raises(ValueError, match="no Hugging Face family") as error:
        save_hf(model, tmp_path / "out")
    for word in ("wiring", "dropout", "embedding_scale"):
        assert word in str(error.value)
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_refused_with_the_reason(tmp_path):
    directory = copied("gpt2", tmp_path)
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin only: a pickle, which can run any code"):
        load_hf(directory)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", None, "has no weights"),
        ("config.json", None, "no config.json"),
        ("config.json", "{", "is not JSON"),
        ("config.json", "[]", "not an object"),
        ("config.json", '{"model_type": "rwkv"}', "model_type 'rwkv'; implemented are .*gpt2, llama"),
        ("config.json", '{"model_type": ["gpt2"]}', "model_type"),
    ],
)
def test_broken_directories_are_named(file, content, message, tmp_path):
    directory = copied("gpt2", tmp_path)
    (directory / file).unlink()
    if content is not None:
        (directory / file).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_hf(directory)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no directory"):
        load_hf(tmp_path / "nowhere")


@pytest.mark.parametrize("kept", [0, 5, 40, 0.5, 0.999])
def test_a_truncated_file_is_refused(kept, tmp_path):
    directory = copied("gpt2", tmp_path)
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ValueError, match="no intact safetensors file"):
        load_hf(directory)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda shards: shards.pop("model.norm.weight"), "model.norm.weight: in model-.*not in the index"),
        (lambda shards: shards.update({"ghost": "model-00001-of-00003.safetensors"}), "ghost: the index says"),
        (lambda shards: shards.update({"model.norm.weight": "gone.safetensors"}), "not there: gone.safetensors"),
        (lambda shards: shards.update({"model.norm.weight": "../up.safetensors"}), "outside its directory"),
        (lambda shards: shards.clear(), "no weight_map"),
    ],
)
def test_an_index_that_contradicts_its_shards_is_refused(edit, message, tmp_path):
    directory = copied("llama-bfloat16-shards", tmp_path)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_hf(directory)


def test_saving_never_replaces_a_model_and_keeps_other_files(tmp_path):
    model = load_hf(FIXTURES / "gpt2")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("left by a save that was killed")
    save_hf(model, tmp_path, max_shard_bytes=8000)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert_same_weights(load_hf(tmp_path), model)
    assert not list(tmp_path.glob(".saving-*"))
    with pytest.raises(ValueError, match="already holds a model"):
        save_hf(model, tmp_path)


def test_a_save_that_fails_leaves_no_model_behind(tmp_path, monkeypatch):
    def fail(*args: Any, metadata: dict[str, str]) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("llmlab.models.safetensors_io.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_hf(load_hf(FIXTURES / "gpt2"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_tied_model_has_no_head_of_its_own():
    assert isinstance(load_hf(FIXTURES / "gpt2").config.head, Tied)
    assert "head.kernel" not in weights_of(load_hf(FIXTURES / "gpt2"))
    assert "head.kernel" in weights_of(load_hf(FIXTURES / "gpt2-untied"))


def test_epsilons_are_read_from_the_config():
    norm = load_hf(FIXTURES / "gpt2-untied").config.final_norm
    assert norm == LayerNorm(epsilon=1e-3)


def test_the_nearest_familys_differences_are_shown_and_the_others_named(tmp_path):
    config = llama.llama(embed_dim=8, num_layers=2, num_heads=2, hidden_dim=8, vocab_size=11)
    model = built(dataclasses.replace(config, embedding_scale=2.0))
    with pytest.raises(ValueError, match="a llama config cannot express this model") as error:
        save_hf(model, tmp_path / "out")
    assert "embedding_scale: 2.0, in llama 1.0" in str(error.value)
    assert "tells of another: gpt2" in str(error.value)
    assert "gpt2 is made of" not in str(error.value)


def test_a_family_that_is_asked_for_is_the_only_one_tried(tmp_path):
    model = built(llama.llama(embed_dim=8, num_layers=1, num_heads=2, hidden_dim=8, vocab_size=11))
    with pytest.raises(ValueError, match=r"the Hugging Face family gpt2 does not compute.*\ngpt2 is made of"):
        save_hf(model, tmp_path / "out", model_type="gpt2")
    with pytest.raises(ValueError, match=r"no family with model_type 'gpt3'; implemented are .*gpt2"):
        save_hf(model, tmp_path / "out", model_type="gpt3")
    save_hf(model, tmp_path / "out", model_type="llama")
    assert_same_weights(load_hf(tmp_path / "out"), model)


def test_weights_are_read_straight_to_the_devices_of_a_mesh(tmp_path: Path) -> None:
    config = llama.llama(embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=24, vocab_size=32)
    model = built(config)
    save_hf(model, tmp_path / "model")
    placement = Mesh(data=1, tensor=2).build(jax.devices()[:2])
    loaded = load_hf(tmp_path / "model", placement=placement)
    _, shapes, axes = config.abstract()
    expected = flatten(placement.shardings(axes, shapes))
    leaves = flatten(split(loaded)[1])
    assert {path: leaf.sharding for path, leaf in leaves.items()} == expected
    halved = [leaf for leaf in leaves.values() if leaf.addressable_shards[0].data.size * 2 == leaf.size]
    assert len(halved) > len(leaves) / 2
    assert_same_weights(loaded, model)
