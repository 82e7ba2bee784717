"""A study: a grid of runs that one YAML file describes, in groups, with the most important group first.

    base:                                   # settings of `ear-ops train` that all runs share
      data_dir: ${XTREME_DATA}/xnli         # the value of the environment variable is put in
      max_train_examples: 9600
    groups:
      - name: learning-rate
        settings: {method: finetune}
        grid: {learning_rate: [2.0e-5, 5.0e-5]}
        select: [learning_rate]             # all later groups take the value that is best on the source's dev set
      - name: methods
        table: "1"                          # the table of the paper to print beside the results
        grid: {method: [finetune, rs-da, ear], seed: [1, 2, 3]}

`cases` in a group is a list of settings that vary together; each case is combined with the whole grid. With
`for: {method: adv}` beside `select`, only runs with these settings take the chosen value. With `keep_model: true`, the
runs keep their models, for `ear-ops analyse`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from ear_ops.errors import shown
from ear_ops.recipes.study.paper_tables import TABLES
from ear_ops.recipes.training.config import SETTING_TYPES, TrainConfig
from ear_ops.recipes.training.errors import ConfigError
from ear_ops.recipes.training.methods import METHOD_SETTINGS, METHODS

Settings = dict[str, Any]

_STUDIES = Path(__file__).parent / "studies"
_WEIGHTING = {"alpha", "beta", "layer", "reduction"}  # the settings of a preset, without the padding
_DEFAULTS = {f.name: f.default for f in fields(TrainConfig) if f.default is not MISSING}


@dataclass(frozen=True)
class Run:
    """One run of a study. Runs that would compute the same have the same name, are equal, and are trained once.

    Attributes:
        settings: all settings of `TrainConfig` but the output folder.
        name: also that of the folder in the folder of the study.
    """

    settings: Settings = field(hash=False, compare=False)
    name: str

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Run:
        """The run with these settings. Settings that its method ignores do not count: `finetune` has no beta.

        Raises:
            ConfigError: a setting is unknown or cannot be used.
        """
        config = TrainConfig.from_dict({name: _typed(name, settings[name]) for name in settings}, output_dir="-")
        used, complete = config.used, config.to_dict()
        if not METHODS[config.method].two_views:
            complete["measure_gradients"] = 0
        if not used & _WEIGHTING:
            complete["preset"] = _DEFAULTS["preset"]
        for name in METHOD_SETTINGS - used:
            complete[name] = _DEFAULTS[name]
        complete = TrainConfig.from_dict(complete, output_dir="-").to_dict()
        # Default values are left out of the name, so a new setting does not rename old runs.
        named = {name: value for name, value in complete.items() if value != _DEFAULTS[name]}
        named = {name: value for name, value in named.items() if name in used or name not in METHOD_SETTINGS}
        digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:10]
        return cls(complete, f"{config.task}-{config.method}-seed{config.seed}-{digest}")

    def config(self, folder: Path) -> TrainConfig:
        return TrainConfig.from_dict(self.settings, output_dir=str(folder / self.name))


@dataclass(frozen=True)
class Group:
    """Runs that belong together: the product of `cases` and `grid` over `settings`."""

    name: str
    table: str | None = None
    settings: Settings = field(default_factory=dict)
    cases: tuple[Settings, ...] = ({},)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    select: tuple[str, ...] = ()
    only_for: Settings = field(default_factory=dict)
    baseline: Settings = field(default_factory=dict)
    keep_model: bool = False

    @property
    def axes(self) -> list[str]:
        """The settings that vary in the group, without the seed."""
        varied = dict.fromkeys([name for case in self.cases for name in case] + list(self.grid))
        return [name for name in varied if name != "seed"]

    def combinations(self) -> Iterator[Settings]:
        for case in self.cases:
            for values in product(*self.grid.values()):
                yield {**self.settings, **case, **dict(zip(self.grid, values, strict=True))}


@dataclass(frozen=True)
class Member:
    """A run in a group. One run may be in several groups.

    Attributes:
        group: of the study.
        group_settings: the settings that the group gives this run.
        run: with all its settings.
    """

    group: Group
    group_settings: Settings
    run: Run

    def row(self) -> Settings:
        """The settings that name the row of this run in the table of the group.

        The values are those of the group. So `finetune` may stand in a row of beta, although it ignores beta.
        """
        axes = [TABLES[self.group.table].axis] if self.group.table else self.group.axes
        return {axis: self.group_settings.get(axis, self.run.settings[axis]) for axis in axes}


@dataclass(frozen=True)
class Selection:
    """The choice of a group with `select`: each candidate with its mean dev accuracy, and the best one."""

    group: Group
    candidates: list[tuple[Settings, float]]
    chosen: Settings


@dataclass(frozen=True)
class Plan:
    """The runs of a study that are known so far. The runs of some groups depend on choices of earlier groups.

    Attributes:
        members: of all groups whose runs are known.
        selections: the choices made so far.
        waiting: the other groups, each with the name of a group whose choice it waits for.
        maybe_kept: method and seed of the runs in waiting groups that keep their models.
    """

    members: list[Member]
    selections: list[Selection]
    waiting: list[tuple[Group, str]]
    maybe_kept: set[tuple[str, int]]

    @property
    def runs(self) -> list[Run]:
        """Every run once, in the order of the file."""
        return list(dict.fromkeys(member.run for member in self.members))

    @property
    def kept_models(self) -> set[str]:
        return {member.run.name for member in self.members if member.group.keep_model}

    def may_keep(self, run: Run) -> bool:
        """Whether a waiting group keeps models of this method and seed, and so may need the model of this run."""
        return (run.settings["method"], run.settings["seed"]) in self.maybe_kept


@dataclass(frozen=True)
class Study:
    """The content of a study's file.

    Attributes:
        base: settings that all runs share.
        groups: in the order of the file.
        text: the YAML, with the values of environment variables put in.
    """

    base: Settings
    groups: tuple[Group, ...]
    text: str

    def plan(self, dev_accuracy: Callable[[Run], float | None]) -> Plan:
        """Expand the groups into runs. A group waits while a choice that it depends on cannot be made.

        Args:
            dev_accuracy: gives the accuracy of a finished run on dev of the source language, and None for others.

        Raises:
            ConfigError: a combination of settings cannot be used, two runs of a group would share a cell of its table,
                or a baseline is no row of its group.
        """
        members: list[Member] = []
        selections: list[Selection] = []
        waiting: list[tuple[Group, str]] = []
        maybe_kept: set[tuple[str, int]] = set()
        open_choices: list[Group] = []
        for group in self.groups:
            chooser = next((candidate for candidate in open_choices if self._chooses_for(candidate, group)), None)
            selection = None
            if chooser is not None:
                waiting.append((group, chooser.name))
                if group.keep_model:
                    supposed = [self._resolved(group, settings).settings for settings in group.combinations()]
                    maybe_kept |= {(settings["method"], settings["seed"]) for settings in supposed}
            else:
                group_members = [
                    Member(group, settings, self._run(group, settings, selections)) for settings in group.combinations()
                ]
                _check_cells(group, group_members)
                _check_baseline(group, group_members)
                members += group_members
                selection = _select(group, group_members, dev_accuracy) if group.select else None
            if selection is not None:
                selections.append(selection)
            elif group.select:
                open_choices.append(group)
        return Plan(members, selections, waiting, maybe_kept)

    def only(self, names: Sequence[str]) -> Study:
        """The study with only these groups, and the groups above that choose a setting for them.

        Raises:
            ConfigError: the study has no group of such a name.
        """
        if unknown := [name for name in names if name not in {group.name for group in self.groups}]:
            known = ", ".join(group.name for group in self.groups)
            raise ConfigError(f"group: the study has none called {', '.join(unknown)}; it has {known}")
        kept: list[Group] = []
        for group in reversed(self.groups):
            if group.name in names or any(self._chooses_for(group, below) for below in kept):
                kept.insert(0, group)
        return replace(self, groups=tuple(kept))

    def _chooses_for(self, group: Group, other: Group) -> bool:
        """Whether a run of `other` takes a value that `group` chooses."""
        return any(
            set(group.select) - run_settings.keys() and self._is_for(group, other, run_settings)
            for run_settings in other.combinations()
        )

    def _is_for(self, chooser: Group, group: Group, group_settings: Settings) -> bool:
        """Whether the choice of `chooser` holds for the run of `group` with these settings."""
        settings = self._resolved(group, group_settings).settings if chooser.only_for else {}
        return all(settings[name] == _typed(name, value) for name, value in chooser.only_for.items())

    def _run(self, group: Group, group_settings: Settings, selections: list[Selection]) -> Run:
        """The run of `group` with these settings, and with the choices that hold for it."""
        chosen: Settings = {}
        for selection in selections:
            if self._is_for(selection.group, group, group_settings):
                chosen |= selection.chosen
        return self._resolved(group, chosen | group_settings)

    def _resolved(self, group: Group, settings: Settings) -> Run:
        try:
            return Run.of({**self.base, **settings})
        except ConfigError as error:
            raise ConfigError(f"group {group.name!r}, {settings}: {error}") from None


class _RepeatedKeyError(yaml.YAMLError):
    """A mapping has a key twice. PyYAML would keep the last value without a word."""


class _StudyLoader(yaml.SafeLoader):
    """Loads plain values, and refuses a repeated key."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise _RepeatedKeyError(
                        f"the key {key.value!r} in line {line} is in line {lines[key.value]} already: keep one of them"
                    )
                lines[key.value] = line
        return node


def package_studies() -> dict[str, Path]:
    """The files of the studies that the package has, by name."""
    return {path.stem: path for path in sorted(_STUDIES.glob("*.yaml"))}


def load_study(name_or_path: str | Path) -> Study:
    """Read and check a study.

    Args:
        name_or_path: a file, or the name of a study of the package. A file goes first.

    Raises:
        ConfigError: the file is missing, not YAML, or has an unknown key or value; the message names the place.
    """
    path = Path(name_or_path)
    if not path.is_file():
        path = package_studies().get(str(name_or_path), path)
    try:
        text = _with_environment(path.read_text(encoding="utf-8"), path)
        content = yaml.load(text, _StudyLoader)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such study: expected a YAML file, or the name of a study of the package: "
            f"{', '.join(package_studies())}"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply for a study") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError comes from a wrong date or a very long number
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected the keys base and groups, got {shown(content)}")
    _check_keys(content, {"base", "groups"}, str(path))
    base = _settings(content.get("base"), f"{path}: base")
    entries = content.get("groups")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: groups: expected a list of groups, got {shown(entries)}")
    groups = tuple(_group(entry, f"{path}: group {number}") for number, entry in enumerate(entries, start=1))
    names = [group.name for group in groups]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{path}: each group needs a name of its own, got {', '.join(repeated)} more than once")
    defined = Study(base, groups, text)
    for number, group in enumerate(groups):
        if group.only_for and not any(defined._chooses_for(group, below) for below in groups[number + 1 :]):
            raise ConfigError(
                f"{path}: group {group.name!r}: for: no run of a group below takes the value that is chosen for "
                f"{group.only_for}: each has other settings, or gives {', '.join(group.select)} itself"
            )
    return defined


def _typed(name: str, value: Any) -> Any:
    """The value as a float where the setting is one. YAML reads 1 as an integer, and 2e-5 as a text."""
    if SETTING_TYPES.get(name) not in (float, float | None) or value is None or isinstance(value, bool):
        return value
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name}: expected a number, got {shown(value)}") from None


def _with_environment(text: str, path: Path) -> str:
    """The text with the values of environment variables in place of ``${NAME}``."""
    variable = re.compile(r"\$\{(\w+)\}")
    missing = [name for name in dict.fromkeys(variable.findall(text)) if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"{path}: expected the environment variables {', '.join(missing)} to be set; the first lines of the file "
            f"and docs/studies.md say to what"
        )
    return variable.sub(lambda match: os.environ[match[1]], text)


_GROUP_KEYS = {"name", "table", "settings", "cases", "grid", "select", "for", "baseline", "keep_model"}


def _group(entry: Any, where: str) -> Group:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ConfigError(f"{where}: expected a mapping with a name, got {shown(entry)}")
    where = f"{where} ({entry['name']})"
    _check_keys(entry, _GROUP_KEYS, where)
    table = entry.get("table")
    if table is not None and table not in list(TABLES):  # a list also takes what has no hash
        raise ConfigError(f"{where}: unknown table {shown(table)}; known: {', '.join(TABLES)} (in quotes)")
    grid = _settings(entry.get("grid"), f"{where}: grid")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: grid: {name}: expected a list of values, got {shown(values)}")
    cases = entry.get("cases", [{}])
    if not isinstance(cases, list) or not cases:
        raise ConfigError(f"{where}: cases: expected a list of settings, got {shown(cases)}")
    select = entry.get("select") or []
    if not isinstance(select, list) or not all(isinstance(name, str) for name in select):
        raise ConfigError(f"{where}: select: expected a list of names of settings, got {shown(select)}")
    group = Group(
        name=entry["name"],
        table=table,
        settings=_settings(entry.get("settings"), f"{where}: settings"),
        cases=tuple(_settings(case, f"{where}: cases") for case in cases),
        grid=grid,
        select=tuple(_settings(dict.fromkeys(select), f"{where}: select")),
        only_for=_settings(entry.get("for"), f"{where}: for"),
        baseline=_settings(entry.get("baseline"), f"{where}: baseline"),
        keep_model=entry.get("keep_model", False),
    )
    for name, value in group.only_for.items():
        try:
            _typed(name, value)
        except ConfigError as error:
            raise ConfigError(f"{where}: for: {error}") from None
    if not isinstance(group.keep_model, bool):
        raise ConfigError(f"{where}: keep_model: expected true or false, got {shown(group.keep_model)}")
    if group.only_for and not group.select:
        raise ConfigError(f"{where}: for: it restricts what `select` chooses, and there is no `select`")
    if missing := [name for name in group.select if name not in group.axes]:
        raise ConfigError(f"{where}: select: {', '.join(missing)} does not vary in this group, so there is no choice")
    if missing := [
        name for name in group.select if any(name not in combination for combination in group.combinations())
    ]:
        raise ConfigError(f"{where}: select: {', '.join(missing)} is missing in one of the cases: give it in each")
    return group


def _settings(value: Any, where: str) -> Settings:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected settings of `ear-ops train`, got {shown(value)}")
    _check_keys(value, _DEFAULTS.keys() - {"output_dir"}, where)
    return value


def _check_keys(content: Mapping[str, Any], known: Any, where: str) -> None:
    for name in content:
        if name not in known:
            raise ConfigError(f"{where}: unknown {shown(name)}; known: {', '.join(sorted(known))}")


def _check_cells(group: Group, members: list[Member]) -> None:
    """Raise ConfigError where two runs would stand in one row with one seed."""
    seen: dict[str, Member] = {}
    for member in members:
        cell = json.dumps([member.row(), member.run.settings["seed"]])
        if cell in seen and seen[cell].run != member.run:
            raise ConfigError(
                f"group {group.name!r}: {seen[cell].group_settings} and {member.group_settings} would stand in one "
                f"row, {member.row()}, of table {group.table}: put them into different groups"
            )
        seen[cell] = member


def _check_baseline(group: Group, members: list[Member]) -> None:
    """Raise ConfigError where the baseline is no row of the group."""
    rows = [member.row() for member in members]
    if not any(group.baseline.items() <= row.items() for row in rows):
        raise ConfigError(
            f"group {group.name!r}: baseline: expected the settings of one of its rows, "
            f"{', '.join(dict.fromkeys(map(str, rows)))}, got {group.baseline}"
        )


def _select(group: Group, members: list[Member], dev_accuracy: Callable[[Run], float | None]) -> Selection | None:
    """The choice of the group, or None while one of its runs is not finished."""
    sums: dict[str, list[float]] = {}
    for member in members:
        accuracy = dev_accuracy(member.run)
        if accuracy is None:
            return None
        key = json.dumps({name: member.group_settings[name] for name in group.select})
        sums.setdefault(key, []).append(accuracy)
    candidates = [(json.loads(key), sum(values) / len(values)) for key, values in sums.items()]
    return Selection(group, candidates, max(candidates, key=lambda candidate: candidate[1])[0])
