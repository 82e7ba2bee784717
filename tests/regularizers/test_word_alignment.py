"""Attention between words: against sums and means written out, and against the loss on tokens where they must agree."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ear_ops import AttentionPull, attach, attention_mse, qk_attention_mse

# Two pairs. In the first, word 1 is two pieces in x and three in x^a, and x has a padded token; in the second, word 3
# is only in x, and the last word only in x^a.
WORDS = torch.tensor([[0, 1, 1, 2, 3, -1], [0, 1, 2, 3, 3, 4], [0, 1, 1, 1, 2, 3], [0, 1, 2, 2, 4, 5]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6, [1] * 6, [1] * 6])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.query(hidden) + self.key(hidden)


def pull(**options: object) -> AttentionPull:
    return AttentionPull(query="query", key="key", num_heads=2, weight=1.0, **options)


def maps(model: Attention, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, H, L, L], 4 numbers a head."""
    query, key = (part(hidden).unflatten(2, (2, 4)).transpose(1, 2) for part in (model.query, model.key))
    return (query @ key.mT / 2).masked_fill(mask[:, None, None, :] == 0, -torch.inf).softmax(-1)


def word_map(attention: torch.Tensor, ids: torch.Tensor, i: int, j: int) -> torch.Tensor:
    """From word i to word j in one row and head; attention [L, L], ids [L]."""
    rows = [sum((attention[p, q] for q in range(6) if ids[q] == j), torch.zeros(())) for p in range(6) if ids[p] == i]
    return sum(rows, torch.zeros(())) / max(len(rows), 1)


def by_hand(model: Attention, hidden: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sum of squared differences over words, and how many (head, word, word) were counted."""
    attention = maps(model, hidden, MASK)
    total, counted = torch.zeros(()), 0
    for pair in range(2):
        present = [set(WORDS[row].tolist()) - {-1} for row in (pair, pair + 2)]
        for head in range(2):
            for i in sorted(present[0] & present[1]):
                for j in sorted(present[0] | present[1]):
                    first, second = (word_map(attention[row, head], WORDS[row], i, j) for row in (pair, pair + 2))
                    total, counted = total + (first - second).square(), counted + 1
    return total, counted


@pytest.mark.parametrize("reduction", ["mean", "equations", "sum"])
def test_words_are_compared(reduction: str) -> None:
    model, hidden = Attention(), torch.randn(4, 6, 8)
    total, counted = by_hand(model, hidden)
    expected = total / {"mean": counted, "equations": 4, "sum": 1}[reduction]
    with attach(model, [pull(alignment="word", reduction=reduction)]) as ear:
        model(hidden, MASK)
        loss = ear.loss(word_ids=WORDS)
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(
        torch.autograd.grad(loss, list(model.parameters())),
        torch.autograd.grad(expected, list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_two_forwards_and_a_pair_of_word_ids() -> None:
    """The views may even have different lengths."""
    model, hidden = Attention(), torch.randn(4, 6, 8)
    with attach(model, [pull(alignment="word")]) as ear:
        model(hidden, MASK)
        expected = ear.loss(word_ids=WORDS)
        for word_ids in (WORDS, (WORDS[:2], WORDS[2:])):
            for view, rows in (("original", slice(0, 2)), ("augmented", slice(2, 4))):
                with ear.view(view):
                    model(hidden[rows], MASK[rows])
            torch.testing.assert_close(ear.loss(word_ids=word_ids), expected)
        with ear.view("original"):
            model(torch.cat([hidden[:2], torch.randn(2, 1, 8)], 1), torch.cat([MASK[:2], torch.zeros(2, 1)], 1))
        with ear.view("augmented"):
            model(hidden[2:], MASK[2:])
        longer = torch.cat([WORDS[:2], torch.full((2, 1), -1)], 1)
        torch.testing.assert_close(ear.loss(word_ids=(longer, WORDS[2:])), expected)


def test_the_words_of_one_view_are_not_those_of_both() -> None:
    model, hidden = Attention(), torch.randn(4, 6, 8)
    with attach(model, [pull(alignment="word")]) as ear:
        for view, rows in (("original", slice(0, 2)), ("augmented", slice(2, 4))):
            with ear.view(view):
                model(hidden[rows], MASK[rows])
        with pytest.raises(ValueError, match=r"expected word_ids \[2, 6\] .* got \[1, 6\]"):
            ear.loss(word_ids=WORDS[:2])
        model(torch.randn(4, 6, 8), MASK)
        with pytest.raises(ValueError, match=r"expected word_ids of one length .* got \[2, 6\] and \[2, 5\]"):
            ear.loss(word_ids=(WORDS[:2], WORDS[2:, :5]))


def test_words_of_one_piece_each_are_tokens() -> None:
    model, hidden = Attention(), torch.randn(4, 6, 8)
    losses = []
    for alignment in ("token", "word"):
        with attach(model, [pull(alignment=alignment, head_weights=[0.5, 2.0])]) as ear:
            model(hidden, MASK)
            losses.append(ear.loss(word_ids=torch.arange(6).expand(4, 6)))
    torch.testing.assert_close(losses[0], losses[1])


def test_what_is_split_otherwise_costs_nothing_between_equal_words() -> None:
    """A word whose pieces share its attention, in any number, is the same word; position by position it is not."""
    keys = torch.tensor([[0.0], [1.0], [-2.0]])

    def view(pieces: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Word w in pieces[w] pieces, among which it divides what it gets."""
        ids = torch.tensor([w for w, n in enumerate(pieces) for _ in range(n)])
        key = keys[ids] - torch.tensor([float(n) for n in pieces]).log()[ids][:, None]
        return key[None], ids[None]

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Identity(), nn.Identity()

        def forward(self, key: torch.Tensor) -> torch.Tensor:
            return self.query(torch.ones_like(key, requires_grad=True)) * self.key(key)

    (key, ids), (key_aug, ids_aug) = view([1, 3, 1]), view([2, 1, 2])
    given = Given()
    losses = {}
    for alignment in ("token", "word"):
        with attach(given, [AttentionPull(query="query", key="key", num_heads=1, alignment=alignment)]) as ear:
            given(torch.cat([key, key_aug]))
            losses[alignment] = ear.loss(word_ids=torch.cat([ids, ids_aug])).item()
    assert losses["word"] < 1e-12 < 1e-4 < losses["token"]


def test_causal_and_grouped_queries_reach_the_words() -> None:
    """By the token loss again, through the words' own path."""
    from ear_ops.capture import AttentionInputs
    from ear_ops.regularizers.word_alignment import word_attention

    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(4, heads, 6, 4, generator=generator) for heads in (4, 2))
    options = {"is_causal": True, "window": 3, "scale": 0.7}
    view = AttentionInputs(query, key, MASK.bool(), MASK.bool(), None, **options)
    ids = torch.arange(6).expand(4, 6)
    expected = qk_attention_mse(query, key, attention_mask=MASK, query_mask=MASK, **options)
    actual = word_attention(view, None, ids, attention_mse, head_weights=None, reduction="mean", what="x")
    torch.testing.assert_close(actual, expected)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="alignment: expected 'token' or 'word', got 'words'"):
        pull(alignment="words")
    with pytest.raises(ValueError, match="'padded_mean' counts padded tokens"):
        pull(alignment="word", reduction="padded_mean")
    model = Attention()
    with attach(model, [pull(alignment="word")]) as ear:
        model(torch.randn(4, 6, 8), MASK)
        with pytest.raises(TypeError, match=r"attention_pull\.query: .* needs word_ids, as in ear\.loss"):
            ear.loss()
        with pytest.raises(ValueError, match=r"expected word_ids \[4, 6\] .* got \[2, 6\]"):
            ear.loss(word_ids=WORDS[:2])


@pytest.mark.parametrize("of_maps", [False, True])
def test_what_padding_holds_does_not_matter(of_maps: bool) -> None:
    from ear_ops.capture import AttentionInputs, AttentionMaps
    from ear_ops.regularizers.word_alignment import word_attention

    torch.manual_seed(0)
    query, key = torch.randn(4, 2, 6, 4), torch.randn(4, 2, 6, 4)
    attention = (query @ key.mT).masked_fill(MASK[:, None, None, :] == 0, -torch.inf).softmax(-1)
    padded = (MASK == 0)[:, None, :, None]
    results = []
    for value in (0.0, float("nan")):
        given = [x.masked_fill(padded, value).requires_grad_() for x in (query, key)]
        if of_maps:
            given = [attention.masked_fill(padded | padded.mT, value).requires_grad_()]
            view = AttentionMaps(given[0], MASK.bool(), MASK.bool())
        else:
            view = AttentionInputs(*given, MASK.bool(), MASK.bool(), None)
        loss = word_attention(view, None, WORDS, attention_mse, head_weights=None, reduction="mean", what="x")
        results.append([loss, *torch.autograd.grad(loss, given)])
    for zero, nan in zip(*results, strict=True):
        assert torch.equal(zero, nan) and zero.isfinite().all()


def _pair_ids(first: int, second: int) -> list[int]:
    """The ids of <s> text </s></s> text </s>, each text one word of so many pieces."""
    return [100, *[0] * first, 101, 102, *[50] * second, 103]


@pytest.mark.parametrize("ids", [[[0, 1, None]] * 4, ([[0, 1, -1]] * 2, [[0, 1, -1]] * 2)], ids=["both", "a pair"])
def test_word_ids_that_are_no_tensors_are_refused(ids: object) -> None:
    model = Attention()
    with attach(model, [pull(alignment="word")]) as ear:
        model(torch.randn(4, 3, 8), torch.ones(4, 3))
        with pytest.raises(TypeError, match=r"word_ids: expected a tensor, got list; pass torch\.tensor"):
            ear.loss(word_ids=ids)


@pytest.mark.parametrize(
    ("ids", "refused"),
    [
        ([0] * 8, True),
        ([0] * 7, False),  # an English word may have several pieces
        (_pair_ids(12, 5), True),
        (_pair_ids(4, 3), False),
        ([100, *[0] * 9, 1, 2, 3, 101], False),  # one long word among others
        ([100, *[0] * 9, *[1] * 9, *[2] * 9, 101], False),  # bytes of three words
    ],
)
@pytest.mark.parametrize("two_forwards", [False, True])
def test_texts_without_spaces_are_refused(ids: list[int], refused: bool, two_forwards: bool) -> None:
    words = torch.tensor([ids, list(range(len(ids)))] * 2)
    words = torch.cat([words, torch.full((4, 2), -1)], 1)
    model, hidden, mask = Attention(), torch.randn(4, words.shape[1], 8), (words >= 0).long()
    with attach(model, [pull(alignment="word")]) as ear:

        def forward() -> None:
            if not two_forwards:
                model(hidden, mask)
                return
            for view, rows in (("original", slice(0, 2)), ("augmented", slice(2, 4))):
                with ear.view(view):
                    model(hidden[rows], mask[rows])

        forward()
        if refused:
            with pytest.raises(ValueError, match=r"attention_pull\.query: .* 1 of 2 pairs .*alignment=.token."):
                ear.loss(word_ids=words)
        else:
            ear.loss(word_ids=words)
        forward()
        words[2] = torch.where(words[2] >= 0, torch.arange(words.shape[1]), -1)  # only one view is one word
        ear.loss(word_ids=words)
