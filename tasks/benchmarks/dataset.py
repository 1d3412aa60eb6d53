"""What the library knows of a benchmark: where its rows come from, how it is asked and scored."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax import processes
from mtl_jax.row_files import Share
from mtl_jax.tasks.benchmarks.origins import Converted, Origin, Row
from mtl_jax.tasks.prompts import Template, load_templates

PROMPTS = Path(__file__).with_name("prompts")

# By data set and split: the rows of the origin, and what `made` made of them.
_MADE: dict[tuple["Dataset", str], tuple[Sequence[Row], Sequence[Row], np.ndarray]] = {}

MetricFn = Callable[..., Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)  # equal by identity, so a key of caches
class Dataset:
    """A data set of a benchmark, with prompts, metrics and citation.

    Attributes:
        name: first part of the tasks' names.
        benchmark: name of the mixture of its tasks.
        origin: where the rows come from, and their fields.
        family: the kind of task, for the tables of results.
        metric_fns: of the benchmark.
        citation: of the paper.
        license: of the data, as far as it is stated; "" where it is not.
        prompts: the file of its prompts below `prompts/`, without ending; "": the name.
        group: `TaskInfo.dataset`, over whose tasks results are summed up; "": the name.
        language: of the inputs.
        trained: whether it has a part for training.
        only: (field, value): the rows of the origin that belong to this data set; None: all.
        sizes: splits and their numbers of rows where `only` chooses; else those of the origin.
        prepare: adds fields that the prompts need; gives a new row.
        fields: of a row, for the postprocessor: what belongs together, all right answers.
        postprocess: SeqIO's, over targets and predictions before the metrics.
    """

    name: str
    benchmark: str
    origin: Origin
    family: str
    metric_fns: Sequence[MetricFn]
    citation: str
    license: str = ""
    prompts: str = ""
    group: str = ""
    language: str = "en"
    trained: bool = True
    only: tuple[str, str] | None = None
    sizes: Mapping[str, int] | None = None
    prepare: Callable[[Row], Row] | None = None
    fields: Callable[[Row], Mapping[str, Any]] | None = None
    postprocess: Callable[..., Any] | None = None

    def rows(self, split: str) -> Sequence[Row]:
        """Returns the rows of a split, read on first use and then kept; see `Origin.rows`."""
        return self._whole(split)[1]

    def _whole(self, split: str) -> tuple[Sequence[Row], Sequence[Row], np.ndarray]:
        rows = self.origin.rows(split)
        found = _MADE.get((self, split))
        if found is None or found[0] is not rows:
            numbers_N = np.array(self._belonging(rows, range(len(rows))), int)
            found = _MADE[self, split] = (rows, self.made(rows), numbers_N)
        return found

    def _belonging(self, rows: Sequence[Row], numbers: Iterable[int]) -> Sequence[int]:
        """Those of the rows' numbers that `only` chooses."""
        if self.only is None:
            return list(numbers)
        field, value = self.only
        return [number for number in numbers if rows[number][field] == value]

    def share(self, split: str, share: Share) -> tuple[Sequence[Row], np.ndarray]:
        """Returns rows, and the positions [N] in them of one of several shares; see `Origin`."""
        rows, own_N = self.origin.share(split, share)
        if processes.several():
            own_N = np.array(self._belonging(rows, own_N), int)
            return Converted(rows, self.prepare) if self.prepare else rows, own_N
        # As caches and evaluations number them: among the rows of this data set.
        _, made, numbers_N = self._whole(split)
        return made, np.flatnonzero(np.isin(numbers_N, own_N))

    def made(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Returns those of the origin's rows that belong here, prepared when they are read."""
        if self.only is not None:
            rows = [rows[number] for number in self._belonging(rows, range(len(rows)))]
        return Converted(rows, self.prepare) if self.prepare else rows

    def split_names(self) -> tuple[str, ...]:
        """Returns the splits; see `Origin.split_names`."""
        return self.origin.split_names() if self.sizes is None else tuple(self.sizes)

    def count(self, split: str) -> int:
        """Returns the number of rows of a split; see `Origin.count`."""
        if self.sizes is None:
            return self.origin.count(split)
        # Of a whole the published parts are known; any other file is looked at.
        whole = self.origin.count(split) == self.origin.splits[split]
        return self.sizes[split] if whole else len(self.rows(split))

    def templates(self) -> list[Template]:
        """Returns the library's own prompts, in the language of the data set."""
        return [
            dataclasses.replace(template, languages=(self.language,))
            if template.languages != (self.language,)
            else template
            for template in read_prompts(self.prompts or self.name)
        ]


@functools.cache
def read_prompts(name: str) -> tuple[Template, ...]:
    """The templates of one file of `prompts/`, parsed once for all data sets that share it."""
    return tuple(load_templates(PROMPTS / f"{name}.yaml"))
