"""BERT's checkpoints and configs as they are found in the wild."""

import json
import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmlab.models import bert
from llmlab.models.heads import MaskedLM, SequenceClassification
from llmlab.models.huggingface import load_hf, save_hf
from tests.drawing import built
from tests.models.references import FIXTURES


def test_a_checkpoint_of_pretraining_in_the_first_release_s_names_loads_as_a_masked_language_model(tmp_path):
    shutil.copytree(FIXTURES / "bert-pretraining", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, spelled in old.items():
        tensors = {name.replace(new, spelled): tensor for name, tensor in tensors.items()}
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_hf(tmp_path)
    assert isinstance(model.config.head, MaskedLM)
    ids = jnp.asarray(load_file(FIXTURES / "bert-pretraining" / "reference.safetensors")["input.input_ids"])
    whole = load_hf(FIXTURES / "bert-pretraining")
    np.testing.assert_array_equal(model(ids).logits, whole(ids).logits)


def test_a_decoder_in_bert_s_clothes_is_refused():
    config = bert.to_hf(replace(bert.preset("nano"), vocab_size=64)) | {"is_decoder": True}
    with pytest.raises(ValueError, match="is_decoder=True is not implemented"):
        bert.from_hf(config)


def test_names_of_labels_survive(tmp_path):
    head = SequenceClassification(names=("negative", "positive"), problem_type="single_label_classification")
    config = bert.bert(embed_dim=8, num_layers=1, num_heads=2, vocab_size=16, head=head)
    save_hf(built(config), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["id2label"] == {"0": "negative", "1": "positive"}
    assert load_hf(tmp_path / "out").config.head == head


def test_what_bert_cannot_express_is_listed():
    model = replace(bert.preset("nano"), vocab_size=64, embedding_norm=None, unpositioned_token=1)
    with pytest.raises(ValueError, match=r"(?s)embedding_norm.*unpositioned_token"):
        bert.to_hf(model)
    with pytest.raises(ValueError, match="id2label"):
        bert.from_hf({"model_type": "bert", "id2label": {"a": "b"}})


# Of the papers' tables: Turc et al. table 1, Devlin et al. section 3, TinyBERT table 1, MiniLM's repository.
MILLIONS = {"tiny": 4.4, "mini": 11.3, "small": 29.1, "medium": 41.7, "base": 110, "large": 340}
MILLIONS |= {"tinybert-4-312": 14.5, "tinybert-6-768": 67, "minilm-l12-h384": 33, "minilm-l6-h384": 22.7}


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_presets_have_the_published_sizes(name, millions):
    assert bert.preset(name).num_parameters() / 1e6 == pytest.approx(millions, rel=0.03)
