"""T0's training mixture at its published sizes, over the prompts of the data folder (P3).

The rows there are the first 200 of each prompt, so rates by their number would be nearly equal.
These are by the sizes of the whole training sets (t-zero's list of datasets):

    t0_train           as in T0: a prompt counts for its examples, but where there are more than
                       500,000, for 500,000 divided by the prompts of its dataset
    t0_train_together  the prompts of a dataset together count for 500,000 at most
"""

import csv
import re
from collections import Counter

import seqio

from mtl_jax.errors import UserError
from mtl_jax.task_info import info
from mtl_jax.tasks import p3
from mtl_jax.tasks.data_folder import data_file

MIXTURES = ("t0_train", "t0_train_together")
_TWIN = {"commonsense_qa": "cos_e_v1_11"}  # not in T0's list, which has the same rows as cos_e


def train_sizes() -> dict[str, int]:
    """Rows of the training set of each dataset, from T0's own list.

    Raises:
        UserError: the list is not in the data folder, or a size in it is no number.
    """
    path = data_file("promptsource", "t0_datasets.csv")
    found = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            name = re.sub(r"\W", "_", "_".join(filter(None, (row["HF_name"], row["subset"]))))
            if row["train_size"]:
                if not row["train_size"].isdigit():
                    raise UserError(f"{path}: the size of {name} is {row['train_size']!r}.")
                found[name] = int(row["train_size"])
    return found | {name: found[twin] for name, twin in _TWIN.items() if twin in found}


def register() -> None:
    """Registers the two mixtures.

    Raises:
        UserError: the list has no size for a dataset of the data folder.
    """
    tasks = [task.name for task in seqio.MixtureRegistry.get(p3.MIXTURE).tasks]
    prompts = Counter(info(task).dataset for task in tasks)
    sizes = train_sizes()
    missing = sorted(prompts.keys() - sizes.keys())
    if missing:
        raise UserError(f"T0's list of datasets has no training size for {', '.join(missing)}.")
    literal, together = [], []
    for task in tasks:
        dataset = info(task).dataset
        size, count = sizes[dataset], prompts[dataset]
        literal.append((task, float(p3.t0_rate(size, count))))
        together.append((task, min(size, p3.LARGEST_DATASET / count)))
    for name, rates in zip(MIXTURES, (literal, together), strict=True):
        seqio.MixtureRegistry.add(name, rates)


register()
