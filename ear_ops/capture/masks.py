"""From the masks that a model received to what the losses take: a key mask, a query mask and a structure.

The 2-D mask that the model received says which keys are padding. The attention module says how attention is structured
beyond that: causal, a sliding window. Its word is checked against the 4-D mask that the model built, because a wrong
structure would change the loss silently. A 4-D mask that no structure explains (packed sequences, chunks, a bias in the
mask) goes to the loss as it is, which costs L*S numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ear_ops.capture.records import AttentionCall, Record, may_be_padding
from ear_ops.ops.probabilities import structure_mask

_FORBIDDEN = -9999.0  # additive masks forbid with -inf, the lowest number of a dtype, -1e9 or -1e4


class Structure(NamedTuple):
    """Which keys a query may attend to by position; ``dense``: only the 4-D mask itself says."""

    is_causal: bool = False
    window: int | None = None
    dense: bool = False


def tensor_mask(mask: Any, rows: int, query_length: int, key_length: int, device: torch.device) -> Any:
    """``mask``; a ``BlockMask`` of FlexAttention as the bool mask ``[rows, 1, L, S]`` that it stands for."""
    if isinstance(mask, Tensor) or not hasattr(mask, "mask_mod"):
        return mask
    from torch.nn.attention.flex_attention import create_mask

    return create_mask(mask.mask_mod, rows, 1, query_length, key_length, device=str(device))


def padding_mask(received: Any, attention_mask: Any, rows: int, length: int, what: str) -> Tensor | None:
    """``[rows, length]`` bool mask of the real tokens, or None where nothing is masked.

    Args:
        received: the ``attention_mask`` given to the model: None, ``[rows, length]``, ``[rows, 1 or H, L, S]``, or
            anything else, which raises.
        attention_mask: what the attention function was given, asked where the model received no 2-D mask.
        rows, length: the size of the batch and the number of keys.
        what: names the place in errors.
    """
    sources = [mask for mask in (received, attention_mask) if isinstance(mask, Tensor)]
    for mask in sources:
        if mask.dim() == 2:
            if tuple(mask.shape) not in ((rows, length), (1, length)):
                raise ValueError(
                    f"{what}: expected an attention_mask of shape {[rows, length]} to go with what the layer computed, "
                    f"the model received {list(mask.shape)}"
                )
            if mask.is_floating_point() and bool((mask < 0).any()):
                raise ValueError(
                    f"{what}: expected an attention_mask with 1 for real tokens and 0 for padding, the model received "
                    f"numbers below 0 (a mask to be added to scores?); give it as bool or integers"
                )
            return (mask != 0).expand(rows, length)
    for mask in sources:
        if mask.dim() == 4 and mask.shape[-1] == length and mask.shape[-2] == 1 < length:
            return allowed_entries(mask).flatten(1, 2).any(1).expand(rows, length)  # one row for all queries
        if mask.dim() == 4 and mask.shape[-1] == mask.shape[-2] == length:
            return _real_keys(allowed_entries(mask), what).expand(rows, length)
    if received is None and attention_mask is None:
        return None
    mask = received if received is not None else attention_mask
    shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(
        f"{what}: cannot tell padding from an attention_mask {shape}; expected None, [{rows}, {length}] or "
        f"[{rows}, 1, {length}, {length}]"
    )


def find_padding(record: Record, model: str, block: str | None, rows: int, length: int, what: str) -> Tensor | None:
    """``[rows, length]`` bool mask of the real tokens of hidden states, or None where nothing is masked.

    A model that was called and takes an ``attention_mask`` by name is believed. Where only its ``forward`` or parts of
    it were called, and where it is no model of transformers, the mask is looked for by its name: in what the block
    received, then in what the root received.

    Args:
        record: of the forward.
        model: path of the model that should have received the mask.
        block: under which name ``record.masks`` has what the block received, or None.
        rows, length: the size of the hidden states.
        what: names the place in errors.

    Raises:
        ValueError: a mask was received whose name does not say whether 1 means real or padding.
    """
    received = record.mask(model, what)
    if received is not None or model in record.masked_models:
        return padding_mask(received, None, rows, length, what)
    # What the root received is of other tokens where a model inside it was called without any mask (an image tower).
    paths = [path for path in (block, model, *([] if model in record.masks else [""])) if path is not None]
    for path in paths:
        received = record.mask(path, what)
        if received is not None:
            return padding_mask(received, None, rows, length, what)
        for name in record.masks.get(path, {}):
            padding = record.mask(path, what, name)
            if name.endswith("key_padding_mask") and isinstance(padding, Tensor):  # as in torch.nn: True is padding
                return padding_mask(real_tokens(padding), None, rows, length, what)
    for path in paths:
        for name in record.masks.get(path, {}):
            mask = record.mask(path, what, name)
            if not may_be_padding(name) or not isinstance(mask, Tensor):
                continue
            if mask.numel() and bool((mask == mask.flatten()[0]).all()):
                continue  # all tokens are real, whatever the number for that
            raise ValueError(
                f"{what}: the model received {name} {list(mask.shape)}, whose name does not say whether 1 means a real "
                f"token or padding, and no attention_mask; call the model's argument attention_mask (1 is real) or "
                f"key_padding_mask (True is padding), or pass ear.loss(attention_mask=...), {[rows, length]}"
            )
    return None


def attention_structure(
    call: AttentionCall, key_mask: Tensor | None, query_mask: Tensor | None, what: str
) -> Structure:
    """How ``call`` attends beyond padding; ``key_mask``: ``[B, S]``, ``query_mask``: ``[B, L]`` bool."""
    mask = call.attention_mask
    query_length, key_length = call.query.shape[2], call.key.shape[2]
    window = None if call.window is None or call.window >= max(query_length, key_length) else call.window
    stated = Structure(call.is_causal, window)  # by the attention module
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        if call.implementation == "eager":
            return Structure()  # eager applies the mask that it is given and nothing else
        if call.implementation == "sdpa":
            stated = Structure(call.is_causal and query_length > 1)  # the window is in the mask as soon as it matters
        elif mask is None and _is_packed(call):
            raise ValueError(
                f"{what}: position_ids begin anew within a row, which {call.implementation!r} reads as several packed "
                f"sequences; give each sequence a row of its own, or load the model with attn_implementation='sdpa'"
            )
        if stated.is_causal and query_length != key_length:
            raise ValueError(
                f"{what}: causal attention of {query_length} queries to {key_length} keys without a mask; "
                f"run the training forward without cached keys (use_cache=False)"
            )
        return stated
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{what}: attention implementation {call.implementation!r} got a mask {shape}, which is not supported; "
            f'expected None, [B, S] or [B, 1, L, S] (attn_implementation="sdpa" or "eager")'
        )
    if call.implementation == "eager" and not mask.is_floating_point():
        raise ValueError(
            f"{what}: eager attention adds the attention_mask {list(mask.shape)} to the scores, so one of {mask.dtype} "
            f"masks nothing in the model; expected numbers, 0 where a query may attend and torch.finfo(dtype).min "
            f"where it may not. Pass such a mask, or a 2-D attention_mask to the model"
        )
    if mask.is_floating_point() and bool(((mask != 0) & (mask > _FORBIDDEN)).any()):
        return Structure(dense=True)  # numbers other than "attend" and "do not": a bias
    allowed = allowed_entries(mask)  # [B, 1 or H, L, S]
    for structure in dict.fromkeys(
        Structure(is_causal, window)
        for is_causal in (stated.is_causal, not stated.is_causal)
        for window in (stated.window, None)
    ):
        expected = structure_mask(query_length, key_length, structure.is_causal, structure.window, mask.device)
        if expected is None:
            expected = torch.ones(query_length, key_length, dtype=torch.bool, device=mask.device)
        if key_mask is not None:
            expected = expected & key_mask.to(mask.device)[:, None, None, :]
        unexplained = allowed ^ expected
        if query_mask is not None:
            unexplained = unexplained & query_mask.to(mask.device)[:, None, :, None]
        if not bool(unexplained.any()):
            return structure
    return Structure(dense=True)


def check_mask_arrived(call: AttentionCall, key_mask: Tensor | None, structure: Structure, what: str) -> None:
    """Raises ValueError where padding is attended to because ``call``, of a user's own function, got no mask.

    transformers builds no mask for a name that has no mask function. Under a causal structure, tokens do not attend to
    padding behind them in any case.
    """
    if key_mask is None or call.attention_mask is not None or _is_known(call.implementation):
        return
    matters = ~key_mask[:, :-1] & key_mask[:, 1:] if structure.is_causal else ~key_mask
    if bool(matters.any()):
        raise ValueError(
            f"{what}: the batch has padding, but no mask reached the attention function {call.implementation!r}, so "
            f"the model attends to padding and the loss would not; transformers gives a function a mask where one is "
            f"registered under its name: AttentionMaskInterface.register({call.implementation!r}, sdpa_mask), both "
            f"from transformers.masking_utils"
        )


def _is_known(implementation: str) -> bool:
    """Whether transformers registers ``implementation`` itself."""
    names, families = ("sdpa", "eager", "flex_attention"), ("flash_attention_", "paged|")
    return implementation in names or implementation.startswith(families)


def _is_packed(call: AttentionCall) -> bool:
    """Whether FlashAttention is told by positions alone, of a single row, where its sequences begin."""
    positions = call.position_ids
    if "flash" not in call.implementation or call.query.shape[0] != 1:
        return False
    return isinstance(positions, Tensor) and positions.dim() <= 2 and bool((positions.diff() != 1).any())


def dense_bias(call: AttentionCall, structure: Structure) -> Tensor | None:
    """The constant ``attn_bias`` of ``call``: its position bias and, where the structure is dense, its mask."""
    bias = None if call.position_bias is None else call.position_bias.detach()
    if not structure.dense:
        return bias
    mask: Tensor = call.attention_mask.detach()
    if mask.is_floating_point():
        mask = mask.masked_fill(mask <= _FORBIDDEN, float("-inf"))
        return mask if bias is None else bias + mask
    return mask if bias is None else bias.masked_fill(~mask, float("-inf"))


def _real_keys(allowed: Tensor, what: str) -> Tensor:
    """``[B, L]`` bool: the keys of ``allowed`` ``[B, 1 or H, L, L]`` that some query may attend to.

    A query whose row would be empty is often opened to all keys, as a softmax of nothing is NaN. Such a row makes no
    padding real, but a query that sees every key by right does: the last one of a causal mask. So the full rows are
    first left aside. Where they alone would make more keys real, the other rows decide what they are, or it is refused.
    """
    position = torch.arange(allowed.shape[-1], device=allowed.device)
    full_rows = allowed.all(-1, keepdim=True)  # [B, H, L, 1]
    full = full_rows[..., 0].any(1)  # [B, L]
    entries = (allowed & ~full_rows).any(1)  # [B, L, L]
    real = entries.any(1)  # [B, L]
    itself = entries.diagonal(dim1=-2, dim2=-1)

    disputed = full.any(1) & ~full.all(1) & ~real.all(1)
    only_full_left = (real | full).all(1)  # no token attends to others while none but full rows attend to it
    causal = ~(entries & (position > position[:, None])).flatten(1).any(1)
    is_last = position == position[-1]
    # By right: real tokens see everything, or it is the last query of a causal mask.
    by_right = only_full_left & ((full & real).any(1) | (causal & (full == is_last).all(1)))
    # Opened: no other token leaves out itself, but padding near real tokens; or a causal mask's first queries.
    opened = ~only_full_left & (itself | ~real).all(1)
    opened = opened | (only_full_left & causal & (full != is_last).any(1) & ~by_right)
    undecided = disputed & ~by_right & ~opened
    # A token alone may be padding that attends to itself to have something in its softmax, or a sequence of one token.
    # Where rows of padding are empty, nobody saw to that.
    alone = itself & (entries.sum(1) == 1) & (entries.sum(2) == 1) & ~full
    some_empty = ~allowed.any(-1).all()
    undecided = undecided | (alone.any(1) & (real.sum(1) > 1) & ~some_empty)
    if bool(undecided.any()):
        row = int(undecided.nonzero()[0])
        raise ValueError(
            f"{what}: the 4-D attention_mask does not say which tokens are padding (row {row} of the batch): some "
            f"attend to every key, or to themselves alone, and no other token attends to them. They may be padding "
            f"that was opened so that no row is empty, or real tokens. Pass a 2-D attention_mask to the model, 1 for "
            f"real tokens and 0 for padding, or to ear.loss(attention_mask=...)"
        )
    return real | (full.all(1) | (disputed & by_right))[:, None]


def real_tokens(key_padding_mask: Tensor) -> Tensor:
    """``[B, S]`` bool of a mask of torch.nn, in which True, or a number that forbids, is padding."""
    return allowed_entries(key_padding_mask if key_padding_mask.is_floating_point() else key_padding_mask == 0)


def allowed_entries(mask: Tensor) -> Tensor:
    """Where a mask given to a model lets a query attend."""
    if mask.is_floating_point():
        return mask > _FORBIDDEN
    return mask != 0
