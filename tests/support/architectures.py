"""Build small random models of the architectures of transformers, and inputs for them.

Sizes have other names in other configurations. :data:`SIZES` has a value for each name, :data:`SPECIAL` has values for
single model types, and :data:`ATTEMPTS` has changes that :func:`build` tries in turn until a model runs.
"""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

LAYERS, HEADS, HIDDEN, VOCABULARY, LENGTH, IMAGE, PATCH = 4, 4, 32, 64, 12, 32, 8
MOST_PARAMETERS = 50_000_000
DEFAULT = object()  # as a value below: the configuration keeps its own value of the field


def _sizes(value: Any, names: str) -> dict[str, Any]:
    """Give one value to several names."""
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = {
    **_sizes(VOCABULARY, "vocab_size text_vocab_size n_token vocab_size_per_layer_input"),
    **_sizes(HIDDEN, "hidden_size d_model dim n_embd emb_dim embed_dim embedding_size encoder_hidden_size"),
    **_sizes(HIDDEN, "decoder_hidden_size true_hidden_size intra_bottleneck_size"),
    **_sizes(LAYERS, "num_hidden_layers n_layer n_layers num_layers num_decoder_layers depth encoder_layers"),
    **_sizes(LAYERS, "decoder_layers num_encoder_layers"),
    **_sizes(HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
    **_sizes(HEADS, "num_encoder_attention_heads num_decoder_attention_heads"),
    **_sizes(2, "num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k"),
    **_sizes(1, "n_group topk_group"),
    **_sizes(48, "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff hidden_dim n_inner d_inner"),
    **_sizes(48, "ffn_hidden_size shared_intermediate_size dense_intermediate_size"),
    **_sizes(16, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size index_head_dim"),
    **_sizes(4, "num_experts num_local_experts n_routed_experts moe_num_experts index_n_heads"),
    **_sizes(8, "head_dim d_kv kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim rotary_dim"),
    **_sizes(8, "q_lora_rank kv_lora_rank projection_dim type_vocab_size mamba_n_heads mamba_d_head mamba_chunk_size"),
    **_sizes(64, "max_position_embeddings n_positions max_seq_len max_source_positions"),
    **_sizes(4, "sliding_window local_attention attention_chunk_size sliding_window_size"),
    **{"image_size": IMAGE, "patch_size": PATCH, "num_channels": 3, "num_frames": 2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2},
    **{"cls_token_id": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "use_cache": False},
}

_SWIN = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_LARGER = {"image_size": 2 * IMAGE}
_MOBILE = {"image_size": 2 * IMAGE, "patch_size": 2, "hidden_act": "linear"}
_DELTA = {"linear_head_dim": 8, "linear_num_heads": HEADS}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["swin", "swinv2", "donut-swin", "maskformer-swin"], _SWIN),
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "bros": {"dim_bbox_sinusoid_emb_1d": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _MROPE}},
    "cosmos3_edge_text": {"head_dim": 8, "rope_parameters": _MROPE},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "falcon_h1": {"mamba_d_ssm": 64},
    "funnel": {"block_sizes": [2, 2], "num_hidden_layers": DEFAULT},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm4v_moe_text": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}},
    "glm5_next_text": {"num_key_value_heads": HEADS, "qk_rope_head_dim": 0, **_DELTA},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan_vl_text": {"rope_parameters": _MROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "led": {"attention_window": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longformer": {"attention_window": 4},
    "kimi_linear": {"num_key_value_heads": HEADS, **_DELTA},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 4},
    "luke": {"entity_vocab_size": 10},
    "mamba2": {"num_heads": 8},
    **{name: {"rope_parameters": _MROPE} for name in ("qwen2_vl_text", "qwen2_5_vl_text")},
    "yolos": {"image_size": [IMAGE, IMAGE]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
    **{
        name: {"image_size": 2 * IMAGE}
        for name in ("convnext", "convnextv2", "pvt", "pvt_v2", "segformer", "swiftformer")
    },
    **dict.fromkeys(["mobilevit", "mobilevitv2"], _MOBILE),
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}

# Latent attention does not share key heads, and M-RoPE needs wide heads.
ATTEMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": HEADS},
    {"head_dim": 64, "hidden_size": 256},
    {"head_dim": 64, "hidden_size": 256, "num_key_value_heads": HEADS},
    {"head_dim": DEFAULT, "num_key_value_heads": DEFAULT, "mamba_n_heads": DEFAULT, "mamba_d_head": DEFAULT},
    {"hidden_size": DEFAULT, "num_attention_heads": DEFAULT, "head_dim": DEFAULT, "num_key_value_heads": DEFAULT},
)


class NotSwept(Exception):
    """The model type is not a text or vision model, or it cannot be built small. The message says why."""


def kind_of(model_class: type) -> str:
    """Return ``"text"``, ``"encoder-decoder"`` or ``"vision"``, which depends on the arguments of the forward."""
    parameters = inspect.signature(model_class.forward).parameters  # type: ignore[attr-defined]
    names = list(parameters)[1:]
    needed = [n for n in names if parameters[n].default is inspect.Parameter.empty and not n.endswith("kwargs")]
    if names[0] == "pixel_values" and "input_ids" not in names and set(needed) <= {"pixel_values"}:
        return "vision"
    others = [n for n in names if "pixel" in n or "audio" in n or "input_features" in n or "image" in n]
    if "input_ids" not in names or others:
        raise NotSwept(f"takes {', '.join(others or needed or names[:3])}")
    return "encoder-decoder" if "decoder_input_ids" in names else "text"


def build(model_type: str) -> tuple[str, Any, int]:
    """Return the kind, a small model in eval mode that runs, and the number of the attempt that gave it."""
    config_class = CONFIG_MAPPING[model_type]
    if config_class not in MODEL_MAPPING:
        raise NotSwept("has no base model")
    model_class = MODEL_MAPPING[config_class]
    kind = kind_of(model_class[0] if isinstance(model_class, (list, tuple)) else model_class)
    failures = []
    for attempt in range(len(ATTEMPTS)):
        try:
            model = build_attempt(model_type, attempt)
            with torch.no_grad():
                run(model, batch_for(model, kind))
            return kind, model, attempt
        except Exception as error:
            failures.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    raise NotSwept(f"cannot be built small and run: {failures[0]}")


def build_attempt(model_type: str, attempt: int, implementation: str | None = None) -> Any:
    """Return a small model in eval mode. Its weights have unit gain, so that its attention is far from uniform."""
    overrides = {**SIZES, **ATTEMPTS[attempt], **SPECIAL.get(model_type, {})}
    config = _small(CONFIG_MAPPING[model_type], overrides)
    config.architectures = config.architectures or []  # a type with several base models reads the list
    torch.manual_seed(0)
    how = {} if implementation is None else {"attn_implementation": implementation}
    with torch.device("meta"):  # needs no memory, and shows how large the model would be
        if sum(p.numel() for p in AutoModel.from_config(copy.deepcopy(config), **how).parameters()) > MOST_PARAMETERS:
            raise ValueError("has sizes that are not named as elsewhere, and is not small")
    model = AutoModel.from_config(config, **how)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() in (2, 4) and parameter.numel():  # linear and convolution
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model.eval()


def _small(config_class: type, overrides: dict[str, Any]) -> Any:
    """Return a configuration with ``overrides`` in its fields and those of nested configurations, where they fit."""
    names = set(inspect.signature(config_class.__init__).parameters) - {"self", "kwargs"}  # type: ignore[misc]
    fields = {name: value for name, value in overrides.items() if name in names and value is not DEFAULT}
    sub_configs: dict[str, Any] = getattr(config_class, "sub_configs", {})
    for name, sub_config in sub_configs.items():
        if sub_config is not AutoConfig and name in names and name not in fields:
            fields[name] = _small(sub_config, overrides)
    while True:
        try:
            return config_class(**fields)
        except Exception as error:  # the field takes a list, for example, and the value is a number
            field = re.search(r"Validation error for field '(\w+)'", str(error))
            if field is None or field[1] not in fields:
                raise
            del fields[field[1]]


def batch_for(model: Any, kind: str, side: str = "right", rows: int = 4) -> dict[str, Tensor]:
    """Return both views of ``rows // 2`` inputs: token ids with padding on ``side``, or images."""
    generator = torch.Generator().manual_seed(1)
    if kind == "vision":
        size = getattr(
            model.config, "image_size", 2 * IMAGE
        )  # models without this field halve the size of their maps often
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        return {"pixel_values": torch.randn(rows, 3, height, width, generator=generator)}
    input_ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator)
    real = torch.tensor([LENGTH, 9, 7, LENGTH - 1])[:rows]
    position = torch.arange(LENGTH)
    mask = position < real[:, None] if side == "right" else position >= LENGTH - real[:, None]
    batch = {"input_ids": input_ids.masked_fill(~mask, 0), "attention_mask": mask.long()}
    if kind == "encoder-decoder":
        batch["decoder_input_ids"] = input_ids[:, :5]
    if "bbox" in inspect.signature(model.forward).parameters:
        batch["bbox"] = torch.zeros(rows, LENGTH, 4, dtype=torch.long)
    return batch


def run(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    """Return the output of the model. The seed makes a model with a random part give the same output each time."""
    torch.manual_seed(0)
    return model(**batch, **options)
