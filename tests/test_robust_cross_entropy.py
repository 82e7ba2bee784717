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


@pytest.mark.parametrize("classes", [[1, 4, 1, 4], [1, 4, 0, 2]])
def test_class_labels_of_each_view(classes: list[int]) -> None:
    """Probabilities may be others in each view, indices are those of the pair."""
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    indices = torch.tensor(classes)
    expected = pytest.approx(sum(negative_log(logits[row], indices[row]) for row in range(4)) / 2, rel=1e-6)
    assert robust_cross_entropy(logits, torch.nn.functional.one_hot(indices, 5).float()).item() == expected
    if classes[:2] == classes[2:]:
        assert robust_cross_entropy(logits, indices).item() == expected


def test_a_batch_of_one_view_with_labels_of_its_rows_is_refused() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    with pytest.raises(ValueError, match=r"labels: .*got 0 in row 0 and 1 in row 2 of 4: does the batch hold both"):
        robust_cross_entropy(logits, labels)
    with pytest.raises(ValueError, match=r"got 2 in row 1 and 1 in row 3 of 4"):
        robust_cross_entropy(logits, torch.tensor([0, 2, 0, 1]))


def test_a_row_that_does_not_count_may_have_a_label_in_the_other_view() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, IGNORED, 0, 1])
    terms = [negative_log(logits[row], labels[row]) for row in (0, 2, 3)]
    assert robust_cross_entropy(logits, labels).item() == pytest.approx(terms[0] + (terms[1] + terms[2]) / 2, rel=1e-6)
    moved = robust_cross_entropy(logits, labels.masked_fill(labels == IGNORED, 7), ignore_index=7)
    assert moved.item() == robust_cross_entropy(logits, labels).item()


def test_labels_of_all_rows_do_not_break_a_compiled_graph() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 0, 2])
    compiled = torch.compile(robust_cross_entropy, fullgraph=True, backend="eager")
    assert compiled(logits, labels).item() == robust_cross_entropy(logits, labels).item()


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


@pytest.mark.parametrize("shared", [True, False])
def test_class_probabilities_of_tokens(shared: bool) -> None:
    logits = torch.randn(4, 3, 5, dtype=torch.float64)
    labels = torch.softmax(torch.randn(2 if shared else 4, 3, 5, dtype=torch.float64), -1)
    both = torch.cat([labels, labels]) if shared else labels
    expected = -2 * (both * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(robust_cross_entropy(logits, labels), expected)


@pytest.mark.parametrize("rows", [4, 8], ids=["shared", "of each view"])
def test_labels_whose_values_cannot_be_read(rows: int) -> None:
    """Under vmap, with fake tensors and in a trace the labels are not compared; the loss is the same."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 8, 5, generator=generator)
    labels = torch.randint(0, 5, (3, 4), generator=generator).repeat(1, rows // 4)
    expected = torch.stack([robust_cross_entropy(*each) for each in zip(logits, labels, strict=True)])
    torch.testing.assert_close(torch.vmap(robust_cross_entropy)(logits, labels), expected)
    gradient = torch.func.grad(robust_cross_entropy)(logits[0], labels[0])
    assert gradient.shape == logits[0].shape and gradient.any()
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda *given: robust_cross_entropy(*given))(
        logits[0], labels[0]
    )
    torch.testing.assert_close(traced(logits[1], labels[1]), expected[1])
    mode = torch._subclasses.FakeTensorMode()
    given = [mode.from_tensor(tensor[0]) for tensor in (logits, labels)]
    with mode:
        fake = robust_cross_entropy(*given)
    assert fake.shape == ()
