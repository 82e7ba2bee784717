"""Prune a multilingual vocabulary and the word embeddings to the pieces that a set of texts uses.

96 million of the 118 million parameters of multilingual-e5-small are word embeddings. The texts of a task use few of
their pieces. The others cost memory, optimiser state and the time of a dense update.

On the texts of the set, the pruned model computes the same, bit for bit. Abdaoui et al. (2020, arXiv:2010.05609) prune
multilingual BERT by language.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_BATCH = 1024  # texts


def prune_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Keep the pieces that `texts` use, the special tokens and all single characters. Drop all other pieces.

    The new tokenizer splits `texts` as before, and the output of the model on them does not change. Other texts still
    work, but with shorter pieces. Make the optimiser after this call, because the embeddings become new parameters.

    Args:
        model: the model, which is changed in place. Its input embeddings shrink, and so does everything that is tied to
            them or has an entry for each piece.
        tokenizer: a fast Unigram or WordPiece tokenizer. It is not changed.
        texts: every text that the model must treat as before: training, validation and test.

    Returns:
        The same model, and a new tokenizer for it.

    Raises:
        ValueError: the tokenizer is of another kind, or it is not the tokenizer of the model. A BPE vocabulary cannot
            be pruned, because its pieces are merged from other pieces.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer: expected a fast tokenizer, got {type(tokenizer).__name__}")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = state["model"]["type"]
    if kind == "Unigram":
        kept = _unigram_ids(state["model"], tokenizer, texts)
    elif kind == "WordPiece":
        kept = _wordpiece_ids(state["model"], tokenizer, texts)
    else:
        raise ValueError(f"tokenizer: expected a Unigram or WordPiece vocabulary, got {kind}, which cannot be pruned")
    kept.update(token["id"] for token in state["added_tokens"])
    kept.update(tokenizer.all_special_ids)
    if tokenizer.pad_token_id is not None:
        # The padding id must not change, because models such as RoBERTa count positions from it.
        kept.update(range(tokenizer.pad_token_id + 1))

    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if max(kept) >= rows:
        raise ValueError(
            f"tokenizer: has token id {max(kept)}, but model embeds only {rows} ids; is it the model's tokenizer?"
        )
    old_ids = sorted(kept)
    new_ids = {old: new for new, old in enumerate(old_ids)}
    pruned = _renumbered_tokenizer(state, tokenizer, new_ids)
    _select_rows(model, torch.tensor(old_ids))
    _renumber_configs(model, rows, new_ids)
    logger.info("vocabulary pruned from %d to %d pieces", rows, len(old_ids))
    return model, pruned


@torch.no_grad()
def restore_vocabulary(
    pruned: PreTrainedModel,
    small: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    weight_decay: float = 0.0,
) -> None:
    """Give a trained model its whole vocabulary back, so that it splits texts of any kind as it did before.

    Dropped pieces get their initial embeddings back. No training text held these pieces, so they had no gradient.
    Training without pruning therefore gives the same model, provided that it has no weight decay. Weight decay shrinks
    every row of the embeddings in every step, also the rows without a gradient.

    Args:
        pruned: the model that was trained after `prune_vocabulary`. It is not changed.
        small: the tokenizer of `pruned`.
        model: the model as it was before pruning. It takes the weights of `pruned` in place.
        tokenizer: the tokenizer of `model`.
        weight_decay: the weight decay with which the embeddings of `pruned` were trained.

    Raises:
        ValueError: `weight_decay` is not 0, or the tokenizer lacks pieces of `small`: then `pruned` was not made from
            this model.
    """
    if weight_decay != 0.0:
        raise ValueError(
            f"weight_decay: expected 0, because decay would have shrunk the dropped embeddings, got {weight_decay}"
        )
    pieces = small.convert_ids_to_tokens(list(range(len(small))))
    rows = cast("list[int]", tokenizer.convert_tokens_to_ids(pieces))
    if len(set(rows)) != len(rows):
        raise ValueError("tokenizer: lacks pieces of the pruned tokenizer; expected the tokenizer that was pruned")
    state = model.state_dict()  # its tensors share their memory with the model
    for name, trained in pruned.state_dict().items():
        if trained.shape == state[name].shape:
            state[name].copy_(trained)
        else:
            state[name][rows] = trained.to(state[name])


def _unigram_ids(model: dict[str, Any], tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> set[int]:
    # Unigram chooses the segmentation with the highest sum of log-probabilities. Without some pieces, there are fewer
    # segmentations to choose from. The best one keeps all of its pieces, so it remains the best, as does every prefix.
    kept = {token for _, ids in _tokenized(tokenizer, texts) for token in ids}
    scores = [score for _, score in model["vocab"]]
    # The cost of an unknown character is that of the least likely piece and a constant, so this piece must stay.
    kept.add(scores.index(min(scores)))
    for token, (piece, _) in enumerate(model["vocab"]):
        if len(piece) == 1 or (model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", piece)):
            kept.add(token)
    return kept


def _wordpiece_ids(model: dict[str, Any], tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> set[int]:
    # WordPiece repeatedly takes the longest piece that matches. That piece is kept, so it remains the longest. Where no
    # piece matches, the whole word is unknown. The pieces before that place must stay, too: without one of them, a
    # shorter piece could match in its place, and the word would not be unknown.
    vocab, prefix = model["vocab"], model["continuing_subword_prefix"]
    kept = {token for piece, token in vocab.items() if len(piece.removeprefix(prefix)) == 1}
    for text, ids in _tokenized(tokenizer, texts):
        kept.update(ids)
        if tokenizer.unk_token_id in ids:
            for word in _words(tokenizer.backend_tokenizer, text):
                kept.update(_longest_matches(word, vocab, prefix))
    return kept


def _tokenized(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Yield each different text once, with its token ids, without special tokens and without truncation."""
    remaining = iter(dict.fromkeys(texts))  # XNLI has each premise three times
    while batch := list(islice(remaining, _BATCH)):
        yield from zip(batch, tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"], strict=True)


def _words(backend: Tokenizer, text: str) -> list[str]:
    normalized = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
    if backend.pre_tokenizer is None:
        return [normalized]
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)]


def _longest_matches(word: str, vocab: dict[str, int], prefix: str) -> Iterator[int]:
    start = 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = (prefix if start > 0 else "") + word[start:end]
            if piece in vocab:
                yield vocab[piece]
                start = end
                break
        else:
            return


def _renumbered_tokenizer(
    state: dict[str, Any], tokenizer: PreTrainedTokenizerBase, new_ids: dict[int, int]
) -> PreTrainedTokenizerFast:
    """Return the tokenizer whose serialised form is `state`, with the pieces in `new_ids` only."""
    model = state["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for token, entry in enumerate(model["vocab"]) if token in new_ids]
        model["unk_id"] = new_ids.get(model["unk_id"])
    else:
        model["vocab"] = {piece: new_ids[token] for piece, token in model["vocab"].items() if token in new_ids}
    for token in state["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    _renumber_post_processor(state["post_processor"], new_ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        **tokenizer.special_tokens_map,
    )


def _renumber_post_processor(processor: dict[str, Any] | None, new_ids: dict[int, int]) -> None:
    if processor is None:
        return
    for nested in processor.get("processors", []):
        _renumber_post_processor(nested, new_ids)
    for token in processor.get("special_tokens", {}).values():  # TemplateProcessing
        token["ids"] = [new_ids[old] for old in token["ids"]]
    for name in ("sep", "cls"):  # BertProcessing and RobertaProcessing: (token, id)
        if name in processor:
            processor[name][1] = new_ids[processor[name][1]]


def _select_rows(model: PreTrainedModel, rows: torch.Tensor) -> None:
    """Keep `rows` ``[kept]`` of the input embeddings, the output embeddings, and the parameters tied to them."""
    output = cast("nn.Linear | None", model.get_output_embeddings())
    old = [cast(nn.Embedding, model.get_input_embeddings()).weight]
    if output is not None:
        old += [output.weight] if output.bias is None else [output.weight, output.bias]
    new = {id(p): nn.Parameter(p.detach()[rows.to(p.device)], requires_grad=p.requires_grad) for p in old}
    # Tied parameters are one object under several names. It is replaced under each name, so they stay tied.
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in new:
                setattr(module, name, new[id(parameter)])
        if isinstance(module, nn.Embedding):
            module.num_embeddings = module.weight.shape[0]
        if module is output:
            module.out_features = len(rows)


def _renumber_configs(model: PreTrainedModel, rows: int, new_ids: dict[int, int]) -> None:
    """Replace the old ids and the old size in the configurations of the model and of all its modules."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    for config in {id(config): config for config in configs if isinstance(config, PretrainedConfig)}.values():
        if getattr(config, "vocab_size", None) == rows:
            config.vocab_size = len(new_ids)
        for name, value in list(vars(config).items()):
            if name.endswith("_token_id") and isinstance(value, int | list):  # a model may have several end tokens
                ids = [new_ids.get(token, token) for token in ([value] if isinstance(value, int) else value)]
                setattr(config, name, ids[0] if isinstance(value, int) else ids)
