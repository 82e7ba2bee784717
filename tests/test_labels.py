"""Labels in a batch of both views: classes, tokens with padding, language models; and the recipe for regression."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from ear_ops import repeat_labels, robust_cross_entropy

IGNORED = -100


def negative_log(logits: torch.Tensor, label: torch.Tensor) -> float:
    """-log softmax(logits)[label], written out; logits [K]."""
    exponentials = [math.exp(value) for value in logits.tolist()]
    return -math.log(exponentials[int(label)] / sum(exponentials))


def mean_over_tokens(logits: torch.Tensor, labels: torch.Tensor, ignored: int = IGNORED) -> float:
    terms = [
        negative_log(logits[row, token], labels[row, token])
        for row in range(labels.shape[0])
        for token in range(labels.shape[1])
        if labels[row, token] != ignored
    ]
    return sum(terms) / len(terms)


@pytest.fixture
def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [2B, L, K] and labels [2B, L] of B = 2 pairs; 5 tokens count in x and 3 in x^a."""
    logits = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 4, IGNORED], [0, 2, 3], [IGNORED, 1, IGNORED], [4, 0, IGNORED]])
    return logits, labels


def test_repeated_labels_go_with_both_views() -> None:
    assert repeat_labels(torch.tensor([3, 1, 2])).tolist() == [3, 1, 2, 3, 1, 2]
    assert repeat_labels(torch.tensor([[3, 1], [2, 0]])).tolist() == [[3, 1], [2, 0], [3, 1], [2, 0]]


def test_token_labels_of_each_view_are_averaged_over_their_own_tokens(tokens) -> None:
    logits, labels = tokens
    expected = mean_over_tokens(logits[:2], labels[:2]) + mean_over_tokens(logits[2:], labels[2:])
    assert robust_cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def test_token_labels_that_both_views_share(tokens) -> None:
    logits, labels = tokens
    expected = mean_over_tokens(logits[:2], labels[:2]) + mean_over_tokens(logits[2:], labels[:2])
    assert robust_cross_entropy(logits, labels[:2]).item() == pytest.approx(expected, rel=1e-6)
    other = labels.masked_fill(labels == IGNORED, 7)
    assert robust_cross_entropy(logits, other[:2], ignore_index=7).item() == pytest.approx(expected, rel=1e-6)


def test_a_view_without_a_counted_token_gives_zero_and_no_gradient(tokens) -> None:
    logits, labels = tokens
    labels = torch.cat([labels[:2], torch.full_like(labels[2:], IGNORED)])
    logits.requires_grad_()
    loss = robust_cross_entropy(logits, labels)
    assert loss.item() == pytest.approx(mean_over_tokens(logits[:2], labels[:2]), rel=1e-6)
    loss.backward()
    assert logits.grad[:2].abs().sum() > 0 and logits.grad[2:].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_class_labels_of_each_view(dtype) -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    classes = torch.tensor([1, 4, 0, 2])
    labels = classes if dtype == torch.int64 else torch.nn.functional.one_hot(classes, 5).float()
    terms = [negative_log(logits[row], classes[row]) for row in range(4)]
    assert robust_cross_entropy(logits, labels).item() == pytest.approx(sum(terms) / 2, rel=1e-6)


def test_causal_language_model() -> None:
    """The sum of the losses that the model itself gives for each view, whose texts are of different length."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = transformers.LlamaForCausalLM(config)
    input_ids = torch.randint(3, 30, (4, 6))
    mask = (torch.arange(6) < torch.tensor([6, 4, 3, 5])[:, None]).long()
    labels = input_ids.masked_fill(mask == 0, IGNORED)
    each = [
        model(input_ids=input_ids[view], attention_mask=mask[view], labels=labels[view]).loss
        for view in (slice(0, 2), slice(2, 4))
    ]
    logits = model(input_ids=input_ids, attention_mask=mask).logits
    torch.testing.assert_close(robust_cross_entropy(logits[:, :-1], labels[:, 1:]), sum(each), rtol=1e-5, atol=0)


def test_twice_the_loss_of_a_model_that_gets_repeated_labels() -> None:
    """What the guide says for models that compute their loss themselves, regression included."""
    torch.manual_seed(0)
    for num_labels, labels in ((3, torch.tensor([0, 2])), (1, torch.tensor([0.5, -1.0]))):
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        config.num_labels = num_labels
        model = transformers.BertForSequenceClassification(config).eval()
        batch = {"input_ids": torch.randint(3, 30, (4, 6))}
        output = model(**batch, labels=repeat_labels(labels))
        if num_labels == 1:
            expected = sum((view[:, 0] - labels).square().mean() for view in output.logits.chunk(2))
        else:
            expected = robust_cross_entropy(output.logits, labels)
        torch.testing.assert_close(2 * output.loss, expected)
