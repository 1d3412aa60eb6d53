"""The numbers of a report: per dataset over its prompts, and over datasets, families, languages.

A `View` is what stands beside each other in one table: a checkpoint, a number of shots and a
protocol. The view of the protocol `OWN` takes for each dataset the first protocol that it was
scored with, so that ranked and generated datasets stand in one table.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mtl_jax import tables
from mtl_jax.sweep_report import bootstrap
from mtl_jax.sweep_report.gather import Checkpoint, Material, Result

OWN = ""  # of protocols: each dataset's first
# A metric has an interval if it is the mean of the scores of the examples; both are rounded.
_TOLERANCE = 0.02
_ENGLISH = ("en", "eng", "english")

Ends = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class View:
    """A checkpoint, a number of shots and a protocol."""

    checkpoint: Checkpoint
    shots: int
    protocol: str


@dataclasses.dataclass(frozen=True)
class Line:
    """One metric of one dataset over its prompts.

    Attributes:
      view: of which it is.
      dataset, split, metric, family: what was measured.
      own: whether the protocol is the dataset's first.
      main: whether the metric is the protocol's first.
      trained: whether some of its prompts or its dataset were trained on.
      prompts: name and value, as evaluated.
      results: of the prompts, in the same order.
      n: examples of the prompt with the most.
      mean, median, quartiles: over prompts; quartiles interpolate linearly.
      replicates: the mean under resampled examples, [B]; None: the metric is no mean of scores.
      baselines: name -> mean over prompts, where all prompts have it.
    """

    view: View
    dataset: str
    split: str
    metric: str
    family: str
    own: bool
    main: bool
    trained: bool
    prompts: tuple[tuple[str, float], ...]
    results: tuple[Result, ...]
    n: int
    mean: float
    median: float
    quartiles: Ends
    replicates: np.ndarray | None
    baselines: Mapping[str, float]

    @property
    def interval(self) -> Ends | None:
        """Bootstrap interval of the mean."""
        return None if self.replicates is None else bootstrap.interval(self.replicates)


@dataclasses.dataclass(frozen=True)
class Average:
    """The mean of datasets' means under their first metric: each dataset counts the same."""

    view: View
    name: str
    lines: tuple[Line, ...]

    @property
    def mean(self) -> float:
        """Over datasets of the mean over prompts."""
        return float(np.mean([line.mean for line in self.lines]))

    @property
    def median(self) -> float:
        """Over datasets, the mean of the medians over prompts."""
        return float(np.mean([line.median for line in self.lines]))

    @property
    def interval(self) -> Ends | None:
        """Bootstrap interval, resampling the examples of every dataset on its own."""
        replicates = [line.replicates for line in self.lines]
        if any(r is None for r in replicates):
            return None
        return bootstrap.interval(np.mean(np.stack([r for r in replicates if r is not None]), 0))

    def baseline(self, name: str) -> float | None:
        """The average of a baseline, where every dataset has it."""
        values = [line.baselines.get(name) for line in self.lines]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if len(known) == len(values) else None


def all_indices(results: Iterable[Result]) -> np.ndarray:
    """The examples that any of the results has scores of, ascending, [N]."""
    known = [result.indices for result in results]
    return np.unique(np.concatenate(known)) if known else np.zeros(0, np.int64)


def scores_matrix(
    results: Sequence[Result], protocol: str, indices_N: np.ndarray
) -> np.ndarray | None:
    """Scores [P, N] of the examples `indices_N`, NaN where there is none; None: a prompt has none.

    Args:
      results: one for each prompt.
      protocol: whose scores.
      indices_N: ascending; at least those of the results.
    """
    matrix_PN = np.full((len(results), len(indices_N)), np.nan)
    for row_N, result in zip(matrix_PN, results, strict=True):
        scores = result.scores.get(protocol)
        if scores is None or not np.isfinite(scores).any():
            return None
        row_N[np.searchsorted(indices_N, result.indices)] = scores
    return matrix_PN


def dataset_lines(material: Material, seed: int = 0) -> list[Line]:
    """All lines, in order of checkpoints, shots, datasets and protocols."""
    by_dataset: dict[tuple[str, str], list[Result]] = {}
    for result in material.results:
        by_dataset.setdefault((result.dataset, result.split), []).append(result)
    found = [
        line
        for (dataset, split), results in by_dataset.items()
        for line in _lines_of(dataset, split, results, seed)
    ]
    places = {checkpoint: place for place, checkpoint in enumerate(material.checkpoints)}
    return sorted(found, key=lambda line: (places[line.view.checkpoint], line.view.shots))


def _lines_of(dataset: str, split: str, results: Sequence[Result], seed: int) -> list[Line]:
    """The lines of one dataset; all share the resamples of its examples."""
    own: dict[tuple[Checkpoint, int], str] = {}
    main: dict[str, str] = {}
    groups: dict[tuple[View, str], list[Result]] = {}
    for result in results:
        for protocol, metric in result.values:
            own.setdefault((result.checkpoint, result.shots), protocol)
            main.setdefault(protocol, metric)
            view = View(result.checkpoint, result.shots, protocol)
            groups.setdefault((view, metric), []).append(result)
    replicates = _replicates(f"{dataset}/{split}", groups, seed)
    made = []
    for (view, metric), members in groups.items():
        values = [member.values[view.protocol, metric] for member in members]
        mean, median, quartiles = tables.over_prompts(values)
        made.append(
            Line(
                view=view,
                dataset=dataset,
                split=split,
                metric=metric,
                family=next((m.family for m in members if m.family), ""),
                own=own[view.checkpoint, view.shots] == view.protocol,
                main=main[view.protocol] == metric,
                trained=any(member.trained for member in members),
                prompts=tuple((m.prompt, v) for m, v in zip(members, values, strict=True)),
                results=tuple(members),
                n=max(member.n for member in members),
                mean=mean,
                median=median,
                quartiles=quartiles,
                replicates=replicates.get((view, metric)),
                baselines=_baselines(members, metric),
            )
        )
    return made


def _replicates(
    name: str, groups: Mapping[tuple[View, str], Sequence[Result]], seed: int
) -> dict[tuple[View, str], np.ndarray]:
    """Resampled means of those groups whose metric is the mean of the examples' scores."""
    indices_N = all_indices(result for members in groups.values() for result in members)
    if len(indices_N) < 2:
        return {}
    matrices: dict[View, np.ndarray | None] = {}
    fitting = {}
    for (view, metric), members in groups.items():
        if view not in matrices:
            matrices[view] = scores_matrix(members, view.protocol, indices_N)
        matrix = matrices[view]
        if matrix is None or len(matrix) != len(members):
            continue
        values = [member.values[view.protocol, metric] for member in members]
        if np.abs(bootstrap.prompt_means(matrix) - values).max() <= _TOLERANCE:
            fitting[view, metric] = matrix
    if not fitting:
        return {}
    views = list(dict.fromkeys(view for view, _ in fitting))
    kept = [matrix for view in views if (matrix := matrices[view]) is not None]
    means_KB = bootstrap.mean_replicates(kept, bootstrap.generator(seed, name))
    by_view = dict(zip(views, means_KB, strict=True))
    return {(view, metric): by_view[view] for view, metric in fitting}


def _baselines(members: Sequence[Result], metric: str) -> dict[str, float]:
    names = dict.fromkeys(name for m in members for name, of in m.baselines if of == metric)
    return {
        name: float(np.mean([member.baselines[name, metric] for member in members]))
        for name in names
        if all((name, metric) in member.baselines for member in members)
    }


def protocols(found: Iterable[Line]) -> list[str]:
    """The protocols in order of appearance."""
    return list(dict.fromkeys(line.view.protocol for line in found))


def in_view(found: Iterable[Line], view: View) -> list[Line]:
    """The lines of a view under their first metric, one for each dataset (and split)."""
    return [
        line
        for line in found
        if line.main
        and (line.view.checkpoint, line.view.shots) == (view.checkpoint, view.shots)
        and (line.own if view.protocol == OWN else line.view.protocol == view.protocol)
    ]


def views(found: Sequence[Line]) -> list[View]:
    """All views, those of `OWN` before those of single protocols."""
    plain = dict.fromkeys((line.view.checkpoint, line.view.shots) for line in found)
    names = [OWN, *protocols(found)]
    there = {line.view for line in found}
    made = [View(checkpoint, shots, name) for name in names for checkpoint, shots in plain]
    return [view for view in made if view.protocol == OWN or view in there]


def averages(found: Sequence[Line]) -> list[Average]:
    """Over all datasets of each view that has at least two."""
    made = [Average(view, "all datasets", tuple(in_view(found, view))) for view in views(found)]
    return [average for average in made if len(average.lines) > 1]


def families(found: Sequence[Line]) -> list[Average]:
    """Over the datasets of each family, in each view; empty where no task tells its family."""
    made = []
    for view in views(found):
        members = in_view(found, view)
        for family in dict.fromkeys(line.family for line in members):
            inside = tuple(line for line in members if line.family == family)
            made.append(Average(view, family or "not told", inside))
    return made if any(line.family for line in found) else []


@dataclasses.dataclass(frozen=True)
class Language:
    """One language of a dataset that is in several.

    `gap` is this language's mean less that of English, in the same view; None where there is no
    English, or this is it. `gap_interval` resamples the examples that both languages have under
    the same index together: translations of one row are hard or easy together.
    """

    view: View
    own: bool  # the protocol is the dataset's first
    dataset: str
    language: str
    metric: str
    prompts: int
    n: int
    mean: float
    interval: Ends | None
    gap: float | None
    gap_interval: Ends | None


@dataclasses.dataclass(frozen=True)
class _Group:
    """A dataset in several languages."""

    view: View
    own: bool
    dataset: str
    split: str
    metric: str


def is_english(language: str) -> bool:
    """Whether a code such as "en" or "en-GB" names English."""
    return language.lower().replace("_", "-").split("-")[0] in _ENGLISH


def base_dataset(dataset: str, language: str) -> str:
    """The dataset's name without its language: `xnli_sw` is of `xnli`."""
    return dataset.removesuffix(f"_{language}") if language else dataset


def languages(found: Sequence[Line], seed: int = 0) -> list[Language]:
    """Per view, dataset and language, for the datasets that are in at least two languages."""
    groups: dict[_Group, dict[str, list[Result]]] = {}
    for line in found:
        if not line.main:
            continue
        for result in line.results:
            if result.language:
                base = base_dataset(line.dataset, result.language)
                group = _Group(line.view, line.own, base, line.split, line.metric)
                by_language = groups.setdefault(group, {})
                by_language.setdefault(result.language, []).append(result)
    # A line has an interval only if its metric is the mean of its scores; so has its language.
    unsound = {
        (line.view, base_dataset(line.dataset, result.language), line.split, line.metric)
        for line in found
        if line.replicates is None
        for result in line.results
    }
    return [
        one
        for group, by_language in groups.items()
        if len(by_language) > 1
        for one in _languages_of(
            group,
            by_language,
            (group.view, group.dataset, group.split, group.metric) not in unsound,
            seed,
        )
    ]


def _languages_of(
    group: _Group,
    by_language: Mapping[str, Sequence[Result]],
    sound: bool,
    seed: int,
) -> list[Language]:
    view, metric = group.view, group.metric
    english = next((name for name in by_language if is_english(name)), None)
    replicates: dict[str, np.ndarray] = {}
    if sound:
        indices_N = all_indices(r for results in by_language.values() for r in results)
        matrices = {
            name: matrix
            for name, results in by_language.items()
            if (matrix := scores_matrix(results, view.protocol, indices_N)) is not None
        }
        rng = bootstrap.generator(seed, f"{group.dataset}/{group.split}")
        if matrices:
            means_KB = bootstrap.mean_replicates(list(matrices.values()), rng)
            replicates = dict(zip(matrices, means_KB, strict=True))
    means = {
        name: float(np.mean([result.values[view.protocol, metric] for result in results]))
        for name, results in by_language.items()
    }
    made = []
    for name, results in by_language.items():
        compared = english is not None and name != english
        paired = compared and name in replicates and english in replicates
        made.append(
            Language(
                view=view,
                own=group.own,
                dataset=group.dataset,
                language=name,
                metric=metric,
                prompts=len(results),
                n=max(result.n for result in results),
                mean=means[name],
                interval=bootstrap.interval(replicates[name]) if name in replicates else None,
                gap=means[name] - means[english] if compared and english else None,
                gap_interval=bootstrap.interval(replicates[name] - replicates[english])
                if paired and english
                else None,
            )
        )
    return sorted(made, key=lambda one: (not is_english(one.language), one.language))
