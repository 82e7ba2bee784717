"""The alignment of languages by layer, before and after the training of a run, and the paper's figures 3 to 5."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from ear_ops.data import DataError, load_parallel, load_synonyms
from ear_ops.installation import install
from ear_ops.recipes.analysis.figures import layer_panels, scatter_panels
from ear_ops.recipes.analysis.states import alignment_by_layer, sentence_states, word_vectors
from ear_ops.recipes.study.definition import load_study
from ear_ops.recipes.study.sweep import STUDY_FILE, StudyError, plan_of
from ear_ops.recipes.tables import markdown_table
from ear_ops.recipes.training import checkpoints
from ear_ops.recipes.training.classifiers import initial_model, trained_model
from ear_ops.recipes.training.errors import ConfigError
from ear_ops.recipes.training.folder import check_initial_model, load_config, versions

PICTURED_SENTENCES = 25  # of each language
PICTURED_LANGUAGES = 6
PICTURED_WORDS = 12  # without their synonyms, which are pictured too
LANGUAGE_NAMES = {
    **{"ar": "Arabic", "bg": "Bulgarian", "de": "German", "el": "Greek", "en": "English", "es": "Spanish"},
    **{"fr": "French", "hi": "Hindi", "ja": "Japanese", "ko": "Korean", "ru": "Russian", "sw": "Swahili"},
    **{"th": "Thai", "tr": "Turkish", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese"},
}


def analyse(
    folders: Sequence[str | Path],
    parallel_dir: str | Path,
    output_dir: str | Path,
    *,
    synonyms: str | Path | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure the model of each run before and after its training, and draw figures 3, 4 and 5 for each.

    A vocabulary that the run pruned is restored first, since the parallel sentences use other pieces.

    Args:
        folders: of finished runs that still have their models, or of studies. Of a study, the finished runs of groups
            with `keep_model: true` are measured.
        parallel_dir: holds `XX-en.tsv`, see `load_parallel`.
        output_dir: gets `analysis.json`, `analysis.md`, and `layers-RUN` and `figure-N-RUN` as PNG and SVG.
        synonyms: the dictionary with the words of figure 4; without it, figure 4 is not drawn.
        limit: sentences of a language, at least 4; by default all.

    Returns:
        What `analysis.json` holds: for each run `before` and `after`, as `alignment_by_layer` returns them, and
        `figures`, the captions by the names of the files; and in `not_run` the runs of the studies that have no model
        yet.

    Raises:
        StudyError: a run has lost its model, a study has no model yet, or two runs have the same name.
        ConfigError, RunFolderError: a study cannot be read, a run of it is damaged, or `limit` is below 4.
        DataError: there are no parallel sentences, or fewer than 4 of a language.
        ModuleNotFoundError: scikit-learn or matplotlib is missing.
    """
    _need_extra()
    if limit is not None and limit < 4:
        raise ConfigError(f"limit: expected at least 4 sentences a language, got {limit}")
    chosen, not_run = _runs_of(folders)
    runs = {folder.name: folder for folder in chosen}
    if len(runs) != len(chosen):
        raise StudyError("two of the runs have folders of the same name: rename one")
    parallel, output_dir = load_parallel(parallel_dir, limit), Path(output_dir)
    if short := [language for language, pairs in parallel.items() if len(pairs) < 4]:
        raise DataError(f"{parallel_dir}: expected at least 4 sentences of each language, got fewer of {short[0]}")
    output_dir.mkdir(parents=True, exist_ok=True)
    english = {sentence for pairs in parallel.values() for _, sentence in pairs}
    groups = _synonym_groups(synonyms, english) if synonyms is not None else []
    content: dict[str, Any] = {"versions": versions(), "not_run": not_run, "runs": {}}
    before: dict[str, Any] = {}  # by pretrained model, since runs that start from one model differ in their heads alone
    for name, folder in runs.items():
        config = load_config(folder)
        check_initial_model(folder, config.model)
        models = {"before": initial_model(config.classifier), "after": trained_model(config.classifier, folder)}
        for model, _ in models.values():
            model.to("cuda" if torch.cuda.is_available() else "cpu")
        if config.model not in before:
            before[config.model] = alignment_by_layer(*models["before"], parallel)
        scatters = _scatters(name, models["before"][1], parallel, groups)
        content["runs"][name] = entry = {
            "method": config.method,
            "seed": config.seed,
            "before": before[config.model],
            "after": alignment_by_layer(*models["after"], parallel),
            "figures": {f"layers-{name}": "Measures by layer."} | {s.name: s.caption for s in scatters},
        }
        checkpoints.write_json(output_dir / "analysis.json", content)  # after every run, so that none is lost
        checkpoints.write_atomically(output_dir / "analysis.md", analysis_markdown(content))
        layer_panels(output_dir / f"layers-{name}.png", _measures_by_layer(entry))
        for scatter in scatters:
            _draw(output_dir, scatter, models)
    return content


def _runs_of(folders: Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """The folders of the runs to analyse, and the names of the runs that have no model yet."""
    runs: list[Path] = []
    not_run: list[str] = []
    for folder in map(Path, folders):
        if not (folder / STUDY_FILE).is_file():
            load_config(folder)
            if damage := checkpoints.damage(folder / "model"):
                raise StudyError(
                    f"{folder} holds no complete model ({damage}): in a study, `keep_model: true` keeps it; if the run "
                    "has finished without it, delete the folder and sweep again"
                )
            runs.append(folder)
            continue
        plan = plan_of(load_study(folder / STUDY_FILE), folder)
        kept = {
            run.name: checkpoints.is_complete(folder / run.name / "model")
            for run in plan.runs
            if run.name in plan.kept_models
        }
        if not any(kept.values()):
            raise StudyError(
                f"{folder}: no run of this study has its model yet: groups with `keep_model: true` keep them; sweep on"
            )
        runs += [folder / name for name, has_model in kept.items() if has_model]
        not_run += [name for name, has_model in kept.items() if not has_model]
    return runs, not_run


def analysis_markdown(content: dict[str, Any]) -> str:
    """A table for each run, with a row for each layer: means over languages, before and after training."""
    lines = [
        "# Alignment of languages by layer",
        "",
        "Layer 0 is the embedding layer. The vector of a sentence is the mean over its tokens. Retrieval: the share of "
        "sentences whose English translation is the nearest by cosine, in %. Alignment: linear centred kernel "
        "alignment with English, debiased. Separation: the mean silhouette with the languages as clusters; a lower "
        "value means that the languages lie within each other. Retrieval and alignment are means over languages; "
        "`analysis.json` has the values of each language. A scatter plot is one t-SNE of the states before and after "
        "training: it shows neighbourhoods and not distances.",
    ]
    for name, run in content["runs"].items():
        header = ["layer", *(f"{measure}, {when}" for measure in _MEASURES for when in ("before", "after"))]
        rows = []
        for layer in range(len(run["before"]["separation"])):
            cells = [
                f"{show(run[when], layer):.{digits}f}"
                for show, digits, _ in _MEASURES.values()
                for when in ("before", "after")
            ]
            rows.append([str(layer), *cells])
        sentences = sum(run["before"]["sentences"].values())
        lines += ["", f"## {name}: {run['method']}, seed {run['seed']}", ""]
        lines += [f"{len(run['before']['sentences'])} languages, {sentences:,} sentence pairs.", ""]
        lines += [markdown_table(header, rows)]
        for figure, caption in run["figures"].items():
            lines += ["", f"![{caption}]({figure}.png)", "", f"{caption} [SVG]({figure}.svg)"]
    if content["not_run"]:
        lines += ["", f"Not run yet: {', '.join(content['not_run'])}."]
    versions_text = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return "\n".join([*lines, "", f"Versions: {versions_text}."]) + "\n"


# For each measure its value in a layer, the digits to print, and the label of its axis.
_MEASURES: dict[str, tuple[Any, int, str]] = {
    "retrieval": (
        lambda measured, layer: 100 * mean(values[layer] for values in measured["retrieval"].values()),
        1,
        "retrieval accuracy (%)",
    ),
    "alignment": (
        lambda measured, layer: mean(values[layer] for values in measured["alignment"].values()),
        3,
        "alignment with English (CKA)",
    ),
    "separation": (lambda measured, layer: measured["separation"][layer], 3, "separation of languages"),
}


def _measures_by_layer(run: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """The values of each layer, by the label of the measure, and before and after training."""
    layers = range(len(run["before"]["separation"]))
    return {
        label: {f"{when} training": [show(run[when], layer) for layer in layers] for when in ("before", "after")}
        for show, _, label in _MEASURES.values()
    }


@dataclass(frozen=True)
class _Scatter:
    """A picture of vectors.

    Attributes:
        name: of its files.
        caption: one or two sentences.
        vectors: of a model, its tokenizer and N texts, [N, C].
        points: the group and the text of each point.
        links, named: as `scatter_panels` takes them.
    """

    name: str
    caption: str
    vectors: Callable[[Any, Any, Sequence[str]], Tensor]
    points: list[tuple[str, str]]
    links: Sequence[tuple[int, int]] = ()
    named: Sequence[int] | None = None


def _scatters(
    name: str, tokenizer: Any, parallel: dict[str, list[tuple[str, str]]], synonyms: list[tuple[str, str]]
) -> list[_Scatter]:
    """Figure 3 (words of parallel sentences), 4 (words and synonyms) and 5 (sentences in the last layer) of a run."""
    pictured = {
        language: pairs[:PICTURED_SENTENCES] for language, pairs in islice(parallel.items(), PICTURED_LANGUAGES)
    }
    sentences = [("en", english) for pairs in pictured.values() for _, english in pairs]
    sentences += [(language, sentence) for language, pairs in pictured.items() for sentence, _ in pairs]
    sentences = list(dict.fromkeys(sentences))
    number = {entry: i for i, entry in enumerate(sentences)}
    translations = [
        (number[language, sentence], number["en", english])
        for language, pairs in pictured.items()
        for sentence, english in pairs
    ]
    words = list(dict.fromkeys((language, word) for language, sentence in sentences for word in sentence.split()))

    def by_language(entries: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return [(LANGUAGE_NAMES.get(language, language), text) for language, text in entries]

    def with_pieces(entries: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Without those that have no piece, such as a zero-width space."""
        return [entry for entry in entries if tokenizer(entry[1], add_special_tokens=False)["input_ids"]]

    words, synonyms = with_pieces(words), with_pieces(synonyms)
    heads: dict[str, int] = {}  # of each group the first member, which is the word itself
    for i, (group, _) in enumerate(synonyms):
        heads.setdefault(group, i)
    scatters = [
        _Scatter(
            f"figure-3-{name}", "Words of parallel sentences in the embedding layer.", word_vectors, by_language(words)
        ),
        _Scatter(
            f"figure-4-{name}",
            "Words in the embedding layer. Lines join a word and its synonyms.",
            word_vectors,
            synonyms,
            links=[(heads[group], i) for i, (group, _) in enumerate(synonyms)],
            named=list(heads.values()),
        ),
        _Scatter(
            f"figure-5-{name}",
            "Parallel sentences in the last layer. Lines join translations.",
            _last_states,
            by_language(sentences),
            links=translations,
        ),
    ]
    return [scatter for scatter in scatters if len(scatter.points) >= 4]  # t-SNE needs 4


def _draw(output_dir: Path, scatter: _Scatter, models: dict[str, tuple[Any, Any]]) -> None:
    texts = [text for _, text in scatter.points]
    vectors = {f"{when} training": scatter.vectors(*model, texts) for when, model in models.items()}
    groups = [group for group, _ in scatter.points]
    scatter_panels(output_dir / f"{scatter.name}.png", vectors, groups, scatter.links, scatter.named)


def _last_states(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    return sentence_states(model, tokenizer, texts)[-1]


def _synonym_groups(path: str | Path, sentences: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of a word and a member of its group, which holds the word and its synonyms.

    The words are those of the sentences that have most synonyms, the more frequent ones first. No member is in two
    groups.
    """
    counts = Counter(word for sentence in sentences for word in sentence.lower().split())
    dictionary = load_synonyms(path)
    groups: dict[str, str] = {}  # the word of the group, by member
    for word in sorted(counts.keys() & dictionary.keys(), key=lambda w: (-len(dictionary[w]), -counts[w], w)):
        members = [word, *dictionary[word]]
        if groups.keys().isdisjoint(members):
            groups.update(dict.fromkeys(members, word))
        if len(set(groups.values())) == PICTURED_WORDS:
            break
    return [(word, member) for member, word in groups.items()]


def _need_extra() -> None:
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        message = f"ear-ops analyse needs {error.name}: {install('analysis')}"
        raise ModuleNotFoundError(message, name=error.name) from None
