"""From the library's data sets to SeqIO tasks and mixtures. Nothing is read until a task is."""

from collections.abc import Iterable, Mapping, Sequence

import seqio

from mtl_jax.tasks.benchmarks.dataset import Dataset
from mtl_jax.tasks.prompted import PromptedTask
from mtl_jax.tasks.prompts import Template


def add_tasks(
    dataset: Dataset,
    features: Mapping[str, seqio.Feature],
    templates: Sequence[Template] = (),
    prefix: str = "",
) -> list[str]:
    """Registers one task for each template and returns their names, `{dataset}_{prompt}`.

    Args:
        dataset: one of the library, or your own.
        features: `inputs` and `targets`.
        templates: the prompts, such as PromptSource's for this data set; empty: the library's own.
        prefix: of the names.

    Raises:
        UserError: a file of prompts that cannot be read.
    """
    return PromptedTask(
        dataset.name,
        dataset.rows,
        templates or dataset.templates(),
        features,
        dataset.split_names(),
        dataset.metric_fns,
        family=dataset.family,
        trained=dataset.trained,
        name_format=f"{prefix}{dataset.name}_{{prompt}}",
        citation=dataset.citation,
        postprocess=dataset.postprocess,
        fields=dataset.fields,
        group=dataset.group,
        count=dataset.count,
        share=dataset.share,
        corrupt=dataset.origin.corrupt,
    ).register()


def register(
    datasets: Iterable[Dataset], features: Mapping[str, seqio.Feature], prefix: str = ""
) -> dict[str, list[str]]:
    """Registers data sets with their own prompts, and a mixture of equal rates for each benchmark.

    Args:
        datasets: of the library.
        features: `inputs` and `targets`; see `features`.
        prefix: of all names, where the same tasks are wanted in another vocabulary as well.

    Returns:
        The names of the tasks by mixture.
    """
    names: dict[str, list[str]] = {}
    for dataset in datasets:
        names.setdefault(prefix + dataset.benchmark, []).extend(
            add_tasks(dataset, features, prefix=prefix)
        )
    for mixture, tasks in names.items():
        seqio.MixtureRegistry.add(mixture, tasks, default_rate=1.0)
    return names
