"""All data sets of the library."""

from mtl_jax.errors import UserError, suggest
from mtl_jax.tasks.benchmarks import (
    bbh,
    classification,
    code,
    commonsense,
    dialogue,
    generation,
    glue,
    mathematics,
    mmlu,
    nli,
    reading,
    super_glue,
)
from mtl_jax.tasks.benchmarks.dataset import Dataset

DATASETS: tuple[Dataset, ...] = (
    *glue.DATASETS,
    *super_glue.DATASETS,
    *nli.DATASETS,
    *reading.DATASETS,
    *generation.DATASETS,
    *commonsense.DATASETS,
    *classification.DATASETS,
    *mathematics.DATASETS,
    *mmlu.DATASETS,
    *bbh.DATASETS,
    *code.DATASETS,
    *dialogue.DATASETS,
)
MULTILINGUAL: tuple[Dataset, ...] = nli.MULTILINGUAL


def find(name: str) -> Dataset:
    """Returns the data set of a name.

    Raises:
        UserError: there is none.
    """
    known = {dataset.name: dataset for dataset in (*DATASETS, *MULTILINGUAL)}
    if name not in known:
        raise UserError(f"The library has no data set {name!r}.{suggest(name, known)}")
    return known[name]
