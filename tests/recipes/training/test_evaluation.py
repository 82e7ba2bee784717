from __future__ import annotations

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ear_ops.data import PairExample
from ear_ops.models.classifier import load_classifier
from ear_ops.recipes.training.evaluation import one_label_notice, predict, score, wilson_interval


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Newcombe (Statistics in Medicine 17, 1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_has_the_published_values(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_is_symmetric_and_holds_the_share(counts: tuple[int, int]) -> None:
    correct, total = counts
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= correct / total + 1e-12 and correct / total - 1e-12 <= high <= 1
    assert wilson_interval(total - correct, total) == pytest.approx((1 - high, 1 - low))


def test_wilson_interval_needs_items() -> None:
    with pytest.raises(ValueError, match="total=0"):
        wilson_interval(0, 0)


def test_a_language_without_any_translated_row_has_no_accuracy_without_them() -> None:
    result = score("ko", [PairExample("NS", "NS", 0)], [0], task="pawsx")
    assert result.all.accuracy == 1.0 and result.translated is None


def test_untranslated_rows_of_pawsx_are_scored_and_left_out_beside() -> None:
    examples = [
        PairExample("a", "b", 1),
        PairExample("NS", "b", 0),
        PairExample("a", "NS", 0),
        PairExample("a", "b", 0),
    ]
    result = score("ko", examples, [1, 1, 0, 1], task="pawsx")
    assert (result.all.correct, result.all.total) == (2, 4)
    assert result.translated is not None and (result.translated.correct, result.translated.total) == (1, 2)
    assert score("ko", examples, [1, 1, 0, 1], task="xnli").translated is None


def test_predictions_come_back_in_the_order_of_the_pairs(tiny_model) -> None:
    model, tokenizer = load_classifier(str(tiny_model), 3)
    examples = [PairExample("a0 " * n, "b1", 0) for n in (9, 1, 5, 3, 7, 2, 8)]
    one_by_one = []
    for example in examples:
        inputs = tokenizer(example.text1, example.text2, return_tensors="pt")
        with torch.no_grad():
            one_by_one.append(int(model(**inputs).logits.argmax()))
    assert predict(model, tokenizer, examples, max_length=24, batch_size=3) == one_by_one

    seen: list[list[int]] = []
    autocast: list[bool] = []

    def by_length(**batch: torch.Tensor) -> SimpleNamespace:
        length = batch["attention_mask"].sum(1)
        seen.append(length.tolist())
        autocast.append(torch.is_autocast_enabled("cpu"))
        return SimpleNamespace(logits=torch.nn.functional.one_hot(length, 64).float())

    stub = SimpleNamespace(eval=lambda: None, device=torch.device("cpu"))
    recorder = type("Model", (), {"__call__": lambda self, **batch: by_length(**batch), **vars(stub)})()
    recorder.eval = stub.eval
    lengths = predict(recorder, tokenizer, examples, max_length=24, batch_size=3)
    assert lengths == [n + 4 for n in (9, 1, 5, 3, 7, 2, 8)]  # pieces of each pair, specials included
    assert autocast == [False] * 3
    assert [len(batch) for batch in seen] == [3, 3, 1] and list(chain(*seen)) == sorted(chain(*seen))
    predict(recorder, tokenizer, examples, max_length=24, batch_size=3, bf16=True)
    assert autocast[3:] == [True] * 3


def test_a_language_whose_labels_are_all_the_same_is_named() -> None:
    mixed, same = [PairExample("a", "b", 0), PairExample("a", "b", 1)], [PairExample("a", "b", 1)] * 2
    assert one_label_notice("test", {"en": mixed, "ko": same[:1]}, "pawsx") is None, "one item has one label"
    notice = one_label_notice("test", {"en": mixed, "ko": same, "de": same}, "pawsx")
    assert notice is not None and notice.startswith("all items of pawsx test have one label in ko ('1'), de ('1'): ")
