"""What an attachment shows of itself: as text, and as a table in notebooks."""

from __future__ import annotations

import functools
import html
import re

import pytest
import torch

from ear_ops import AttentionPull, CosineSchedule, EmbeddingPush, SentencePull, attach


def cells(text: str) -> list[list[str]]:
    """The rows of a text table, whose cells are two spaces apart."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()[1:]]


def html_cells(text: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows]


def test_it_says_what_hangs_where_and_its_last_terms(tools) -> None:
    model = tools.build_model("bert")
    regularizers = [EmbeddingPush(0.5), AttentionPull({2: 0.5}, CosineSchedule(1.0, 0.0, 9)), SentencePull(3, len)]
    with attach(model, regularizers) as ear:
        before = cells(repr(ear))
        model(**tools.build_batch())
        ear.regularizers[2].weight = functools.partial(max, 0.5)
        ear.loss(step=2)
        text, table = repr(ear), ear._repr_html_()
        terms = [f"{term.item():.4g}" for term in ear.components().values()]
    assert text.splitlines()[0] == "Attachment on BertForSequenceClassification"
    assert cells(text) == html_cells(table), "both say the same"
    assert [row[-1] for row in before] == ["last term", "-", "-", "-"]
    assert [row[-1] for row in cells(text)] == ["last term", *terms]
    assert [row[:4] for row in before] == [
        ["regulariser", "kind", "place", "weight"],
        ["embedding_push", "EmbeddingPush", "input of bert.encoder.layer.0", "0.5"],
        [
            "attention_pull.2",
            "AttentionPull",
            "attention at bert.encoder.layer.1.attention.self",
            "0.5 * CosineSchedule(start=1.0, end=0.0, steps=9)",
        ],
        ["sentence_pull.3", "SentencePull", "output of bert.encoder.layer.2", "len"],
    ]
    assert repr(ear).splitlines()[0] == "Attachment on BertForSequenceClassification, detached"


def test_names_are_escaped_in_the_table() -> None:
    modules = torch.nn.ModuleDict({"q<b>": torch.nn.Linear(8, 8), "k": torch.nn.Linear(8, 8)})
    pull = AttentionPull(query="q<b>", key="k", num_heads=2, name="<script>alert(1)</script> & more")
    with attach(modules, [pull]) as ear:
        table = ear._repr_html_()
    assert "<script>" not in table and "<b>" not in table and "&lt;script&gt;" in table
    assert html_cells(table)[1][:3] == [pull.name, "AttentionPull", "projections q<b> and k"]


def test_it_shows_where_the_teacher_is_looked_at(tools) -> None:
    student, teacher = tools.build_model("bert", layers=2), tools.build_model("bert", layers=4)
    with attach(student, [AttentionPull(1)], teacher=teacher) as ear:
        assert "with the teacher BertForSequenceClassification" in repr(ear)
        header, row = cells(repr(ear))
    assert header[2:4] == ["place", "place in the teacher"]
    assert row[2:4] == [f"attention at bert.encoder.layer.{index}.attention.self" for index in (0, 1)]


@pytest.mark.parametrize("layer", [1, 3])
def test_a_layer_that_runs_again_and_again_is_told_apart(layer: int) -> None:
    import transformers

    config = transformers.AlbertConfig(
        vocab_size=60,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
    )
    with attach(transformers.AlbertModel(config), [AttentionPull(layer)]) as ear:
        assert f" (call {layer} of 3)" in repr(ear)
