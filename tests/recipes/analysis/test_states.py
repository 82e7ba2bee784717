from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_task import save_tiny_model
from transformers import AutoModel, AutoTokenizer

from ear_ops.recipes.analysis.states import alignment_by_layer, sentence_states, word_vectors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = save_tiny_model(tmp_path_factory.mktemp("model"))
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_a_sentence_is_the_mean_over_its_own_tokens_in_every_layer(tiny) -> None:
    model, tokenizer = tiny
    texts = ["a1 b2 c3 d4 a2", "a1", "b2 c3"]
    states = sentence_states(model, tokenizer, texts, batch_size=2)
    assert states.shape == (3, 3, 16)
    for i, text in enumerate(texts):  # alone, without padding
        with torch.no_grad():
            alone = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        expected = torch.stack([layer[0].mean(dim=0) for layer in alone])
        assert torch.allclose(states[:, i], expected, atol=1e-5)


def test_a_word_is_the_mean_of_its_pieces(tiny) -> None:
    model, tokenizer = tiny
    table = model.get_input_embeddings().weight.detach()
    ids = tokenizer.convert_tokens_to_ids(["a1", "b2"])
    embedded = word_vectors(model, tokenizer, ["a1", "a1 b2"])
    assert torch.allclose(embedded, torch.stack([table[ids[0]], table[ids].mean(dim=0)]))
    with pytest.raises(ValueError, match="at least one piece, got ''"):
        word_vectors(model, tokenizer, ["a1", ""])


def test_every_layer_and_language_is_measured(tiny) -> None:
    pytest.importorskip("sklearn", reason="needs the extra `analysis`")
    model, tokenizer = tiny
    english = [f"a{i} b{i}" for i in range(8)]
    parallel = {"de": [(text, text) for text in english], "sw": [(english[-i], english[i]) for i in range(5)]}
    measured = alignment_by_layer(model, tokenizer, parallel, clustered=4)
    assert measured["sentences"] == {"de": 8, "sw": 5}
    assert measured["retrieval"]["de"] == [1.0] * 3 and measured["alignment"]["de"] == pytest.approx([1.0] * 3)
    assert max(measured["retrieval"]["sw"]) < 1 and len(measured["alignment"]["sw"]) == 3
    assert len(measured["separation"]) == 3
