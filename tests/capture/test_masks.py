"""Structure and padding read off whatever mask a model was given."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from ear_ops import AttentionPull, EmbeddingPush, attach
from ear_ops.capture.masks import Structure, attention_structure, dense_bias, padding_mask
from ear_ops.capture.records import AttentionCall

ROWS, LENGTH = 2, 6
KEYS = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
LOWEST = torch.finfo(torch.float32).min


def call_with(mask, implementation="sdpa", query_length=LENGTH, **keywords):
    query, key = torch.randn(ROWS, 4, query_length, 8), torch.randn(ROWS, 2, LENGTH, 8)
    return AttentionCall(implementation, nn.Identity(), query, key, key, mask, **keywords)


def allowed(causal=False, window=None, keys=KEYS):
    """Which key each query may attend to, entry by entry: [rows, 1, L, S]."""
    table = torch.zeros(ROWS, 1, LENGTH, LENGTH, dtype=torch.bool)
    for row in range(ROWS):
        for i in range(LENGTH):
            for j in range(LENGTH):
                far = window is not None and abs(i - j) >= window
                table[row, 0, i, j] = bool(keys[row, j]) and not far and not (causal and j > i)
    return table


def additive(table, lowest=LOWEST):
    return torch.zeros(table.shape).masked_fill(~table, lowest)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 2, 4])
@pytest.mark.parametrize("said_causal", [False, True])
@pytest.mark.parametrize("convert", [lambda table: table, additive, lambda table: additive(table, float("-inf"))])
def test_structure_is_found_whatever_the_module_says(causal, window, said_causal, convert):
    call = call_with(convert(allowed(causal, window)), is_causal=said_causal, sliding_window=window)
    assert attention_structure(call, KEYS, KEYS, "x") == Structure(causal, window)


def test_window_that_no_keyword_names_is_dense():
    call = call_with(allowed(window=2), is_causal=False)
    assert attention_structure(call, KEYS, KEYS, "x").dense


def test_batch_shorter_than_the_window_has_none():
    call = call_with(allowed(causal=True), is_causal=True, sliding_window=100)
    assert attention_structure(call, KEYS, KEYS, "x") == Structure(True)


def test_padded_queries_do_not_matter():
    table = allowed(causal=True)
    table[1, :, 4:] = True  # what sdpa gets for rows that would otherwise attend to nothing
    call = call_with(table, is_causal=True)
    assert attention_structure(call, KEYS, KEYS, "x") == Structure(True)
    assert attention_structure(call, KEYS, None, "x").dense


def test_one_forbidden_entry_is_not_overlooked():
    table = allowed()
    table[0, 0, 5, 0] = False
    call = call_with(table, is_causal=False)
    structure = attention_structure(call, KEYS, KEYS, "x")
    assert structure.dense and torch.equal(dense_bias(call, structure), table)


def test_bias_folded_into_the_mask_is_passed_on():
    mask = additive(allowed()) + torch.linspace(-3, 3, LENGTH)
    call = call_with(mask, is_causal=False)
    structure = attention_structure(call, KEYS, KEYS, "x")
    assert structure.dense
    bias = dense_bias(call, structure)
    real = allowed().expand_as(bias)
    assert torch.equal(bias[real], mask[real]) and bool((bias[~real] == float("-inf")).all())


def test_position_bias_is_a_constant_and_joins_a_dense_mask():
    position_bias = torch.randn(1, 4, LENGTH, LENGTH, requires_grad=True)
    call = call_with(allowed(), is_causal=False, position_bias=position_bias)
    bias = dense_bias(call, Structure())
    assert torch.equal(bias, position_bias) and not bias.requires_grad
    bias = dense_bias(call, Structure(dense=True))
    assert torch.equal(bias, additive(allowed(), float("-inf")) + position_bias)


@pytest.mark.parametrize(
    ("implementation", "mask", "expected"),
    [
        ("eager", None, Structure()),  # eager does what its mask says and nothing else
        ("sdpa", None, Structure(True)),
        ("flash_attention_2", None, Structure(True, 3)),
        ("flash_attention_2", KEYS, Structure(True, 3)),
    ],
)
def test_structure_without_a_four_dimensional_mask(implementation, mask, expected):
    call = call_with(mask, implementation, is_causal=True, sliding_window=3)
    assert attention_structure(call, KEYS, KEYS, "x") == expected


def test_cached_keys_without_a_mask_are_refused():
    call = call_with(None, query_length=2, is_causal=True)
    with pytest.raises(ValueError, match="causal attention of 2 queries to 6 keys"):
        attention_structure(call, None, None, "x")


def test_mask_objects_are_refused():
    with pytest.raises(ValueError, match=r"x: attention implementation 'flex_attention' got a mask object"):
        attention_structure(call_with(object(), "flex_attention"), None, None, "x")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_padding_from_two_dimensions(dtype):
    assert torch.equal(padding_mask(KEYS.to(dtype), allowed(causal=True), ROWS, LENGTH, "x"), KEYS)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_from_four_dimensions(causal):
    for mask in (allowed(causal), additive(allowed(causal))):
        assert torch.equal(padding_mask(mask, None, ROWS, LENGTH, "x"), KEYS)
        assert torch.equal(padding_mask(None, mask, ROWS, LENGTH, "x"), KEYS)


def test_no_padding():
    assert padding_mask(None, None, ROWS, LENGTH, "x") is None


@pytest.mark.parametrize("received", [KEYS[:, :4], KEYS[:1].expand(3, LENGTH)])
def test_padding_of_another_shape_names_both(received):
    with pytest.raises(ValueError, match=rf"x: .*\[2, 6\].*received \[{received.shape[0]}, {received.shape[1]}\]"):
        padding_mask(received, None, ROWS, LENGTH, "x")


@pytest.mark.parametrize("received", [{"full_attention": None}, torch.ones(2, 6, 6)])
def test_padding_of_unknown_kind_is_refused(received):
    with pytest.raises(ValueError, match="x: cannot tell padding"):
        padding_mask(received, None, ROWS, LENGTH, "x")


def test_a_window_longer_than_the_row_is_none():
    for window, expected in ((LENGTH - 1, LENGTH - 1), (LENGTH, None), (4096, None)):
        call = call_with(KEYS, "flash_attention_2", is_causal=True, sliding_window=window)
        assert attention_structure(call, KEYS, KEYS, "x") == Structure(True, expected)


def test_rows_packed_by_positions_are_refused_where_only_flash_attention_sees_it():
    def call(positions, implementation="flash_attention_2", rows=1):
        query, key = torch.randn(rows, 4, LENGTH, 8), torch.randn(rows, 2, LENGTH, 8)
        keywords = {"is_causal": True, "position_ids": torch.tensor([positions] * rows)}
        return AttentionCall(implementation, nn.Identity(), query, key, key, None, **keywords)

    with pytest.raises(ValueError, match="layer 3: position_ids begin anew within a row"):
        attention_structure(call([0, 1, 2, 0, 1, 2]), None, None, "layer 3")
    for fine in (call([4, 5, 6, 7, 8, 9]), call([0, 1, 2, 0, 1, 2], "sdpa"), call([0, 1, 2, 0, 1, 2], rows=2)):
        assert attention_structure(fine, None, None, "x") == Structure(True)


def test_a_mask_that_is_to_be_added_to_scores_is_refused():
    received = torch.tensor([[0.0, 0.0, -1e9], [0.0, -1e9, -1e9]])
    with pytest.raises(ValueError, match=r"layer 3: expected an attention_mask with 1 for real tokens"):
        padding_mask(received, None, 2, 3, "layer 3")
    assert padding_mask((received == 0).float(), None, 2, 3, "x").tolist() == (received == 0).tolist()


def without_diagonal(table):
    return table & ~torch.eye(LENGTH, dtype=torch.bool)


def left_padded(causal=True):
    """Row 1 has its two padded tokens at the left; their queries have no key of a causal mask."""
    return allowed(causal, keys=KEYS.flip(1)), KEYS.flip(1)


def opened(table):
    """Rows without any key opened to all of them."""
    return table | ~table.any(-1, keepdim=True)


@pytest.mark.parametrize("convert", [lambda table: table, additive])
def test_tokens_that_do_not_attend_to_themselves_are_real(convert):
    mask = convert(without_diagonal(allowed()))
    assert torch.equal(padding_mask(mask, None, ROWS, LENGTH, "x"), KEYS)


def test_a_causal_mask_without_its_diagonal_and_with_an_opened_first_row_is_refused():
    """Whether the last token is real shows nowhere: no other attends to it."""
    mask = opened(without_diagonal(allowed(causal=True)))
    with pytest.raises(ValueError, match="row 0 of the batch"):
        padding_mask(mask, None, ROWS, LENGTH, "x")


@pytest.mark.parametrize("open_rows", [opened, lambda table: table])
@pytest.mark.parametrize("heads", [1, 3])
def test_left_padding_with_and_without_opened_rows(open_rows, heads):
    table, keys = left_padded()
    mask = open_rows(table).expand(ROWS, heads, LENGTH, LENGTH)
    assert torch.equal(padding_mask(mask, None, ROWS, LENGTH, "x"), keys)


def test_padding_beyond_a_window_with_opened_rows():
    """Padded queries near the real tokens see some of them, those further away see none and are opened."""
    keys = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    for causal in (False, True):
        mask = opened(allowed(causal, window=3, keys=keys))
        assert bool(mask[1, 0].all(-1).any())
        assert torch.equal(padding_mask(mask, None, ROWS, LENGTH, "x"), keys)


def test_a_key_is_real_where_any_head_attends_to_it():
    """One head sees the even keys, another the odd ones."""
    table = allowed().repeat(1, 2, 1, 1)
    table[:, 0, :, ::2] = False
    table[:, 1, :, 1::2] = False
    assert torch.equal(padding_mask(table, None, ROWS, LENGTH, "x"), KEYS)
    heads = torch.cat([allowed(), allowed(causal=True, window=2)], 1)  # the second has opened rows in row 1
    assert torch.equal(padding_mask(opened(heads), None, ROWS, LENGTH, "x"), KEYS)


@pytest.mark.parametrize("fill", [opened, lambda table: table | torch.eye(LENGTH, dtype=torch.bool)])
def test_a_mask_that_does_not_say_what_is_padding_is_refused(fill):
    """Queries that see everything, or themselves alone, while no other sees them."""
    mask = fill(allowed() & KEYS[:, None, :, None])
    with pytest.raises(ValueError, match=r"layer 3: the 4-D attention_mask does not say.*row 1 .*Pass a 2-D"):
        padding_mask(mask, None, ROWS, LENGTH, "layer 3")


def test_a_sequence_of_one_token_is_real_where_padding_was_left_without_keys():
    segments = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 1, 2, 2])  # the second cut to one token
    same = torch.stack([segment[:, None] == segment for segment in segments])[:, None]
    mask = allowed() & KEYS[:, None, :, None] & same
    assert torch.equal(padding_mask(mask, None, ROWS, LENGTH, "x"), KEYS)
    with pytest.raises(ValueError, match="row 1 of the batch"):
        padding_mask(mask | torch.eye(LENGTH, dtype=torch.bool), None, ROWS, LENGTH, "x")


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_rows_of_a_causal_mask_are_real(length):
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(ROWS, 1, length, length)
    assert bool(padding_mask(mask, None, ROWS, length, "x").all())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_mask_that_eager_attention_would_add_as_zeros_and_ones_is_refused(dtype):
    call = call_with(allowed().to(dtype), "eager", is_causal=False)
    with pytest.raises(ValueError, match=r"layer 3: eager attention adds the attention_mask \[2, 1, 6, 6\]"):
        attention_structure(call, KEYS, KEYS, "layer 3")
    assert attention_structure(call_with(additive(allowed()), "eager"), KEYS, KEYS, "x") == Structure()


def test_losses_of_a_mask_without_its_diagonal_are_not_zero():
    torch.manual_seed(0)
    shape = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**shape, intermediate_size=24, initializer_range=0.3)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(5, 60, (4, 7))
    mask = (~torch.eye(7, dtype=torch.bool)).expand(4, 1, 7, 7)
    with attach(model, [AttentionPull(2), EmbeddingPush()]) as ear:
        model(input_ids=ids, attention_mask=mask)
        ear.loss()
        terms = ear.components()
    model.set_attn_implementation("eager")
    out = model(input_ids=ids, attention_mask=additive(mask), output_attentions=True, output_hidden_states=True)
    attn, embedded = out.attentions[1], out.hidden_states[0].mean(1)
    torch.testing.assert_close(terms["attention_pull.2"], (attn[:2] - attn[2:]).square().mean())
    torch.testing.assert_close(terms["embedding_push"], -(embedded[:2] - embedded[2:]).square().mean())


@pytest.mark.parametrize("lowest", [-1e4, -1e9, LOWEST, float("-inf")])
@pytest.mark.parametrize("causal", [False, True])
def test_every_number_that_is_used_to_forbid_forbids(lowest, causal):
    """-1e4 is what models in half precision add."""
    mask = additive(allowed(causal), lowest)
    assert torch.equal(padding_mask(None, mask, ROWS, LENGTH, "x"), KEYS)
    call = call_with(mask, is_causal=causal)
    assert attention_structure(call, KEYS, KEYS, "x") == Structure(causal)
    dense = dense_bias(call, Structure(dense=True))
    assert torch.equal(dense == float("-inf"), ~allowed(causal))


def test_queries_behind_cached_keys_are_the_last_of_the_tokens():
    """A forward of 3 tokens behind 3 cached ones: what is padding among the queries stands at the end of the mask."""
    torch.manual_seed(0)
    shape = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**shape, intermediate_size=24, initializer_range=0.3, pad_token_id=0)
    model = transformers.LlamaModel(config).eval()
    ids = torch.randint(5, 60, (4, 6))
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])

    def cached():
        with torch.no_grad():
            return model(input_ids=ids[:, :3], attention_mask=mask[:, :3], use_cache=True).past_key_values

    with attach(model, [AttentionPull(2, 1.0)]) as ear:
        model(input_ids=ids[:, 3:], attention_mask=mask, past_key_values=cached())
        loss = ear.loss()
    model.set_attn_implementation("eager")
    out = model(input_ids=ids[:, 3:], attention_mask=mask, past_key_values=cached(), output_attentions=True)
    maps, maps_aug = out.attentions[1].chunk(2)  # [2, 2, 3, 6]
    real, real_aug = mask.bool().chunk(2)
    counted = (real & real_aug)[:, None, 3:, None] & (real | real_aug)[:, None, None, :]
    torch.testing.assert_close(loss, (maps - maps_aug)[counted.expand_as(maps)].square().mean(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_that_is_longer_than_the_queries_alone_stays(causal):
    """Two queries behind cached keys: a window of 3 hides keys from them, though all queries fit into it."""
    call = call_with(allowed(causal, window=3)[:, :, -2:], query_length=2, is_causal=causal, sliding_window=3)
    assert attention_structure(call, KEYS, KEYS[:, -2:], "x") == Structure(causal, 3)
    call = call_with(KEYS, "flash_attention_2", query_length=2, is_causal=False, sliding_window=3)
    assert attention_structure(call, KEYS, KEYS[:, -2:], "x") == Structure(False, 3)
