"""Tasks and mixtures by name: importing their modules, mixtures from Gin, rates, vocabularies."""

from mtl_jax.mixtures.made import build_mixture, held_out, leave_one_out
from mtl_jax.mixtures.names import (
    DATA_FOLDER_VARIABLE,
    check_split,
    count_examples,
    expand,
    load_modules,
    provider,
    rates_of,
    task_names,
    training_rates,
    vocabulary,
)
from mtl_jax.mixtures.rates import (
    dataset_rate,
    dataset_total_rate,
    examples_rate,
    unimax_shares,
)
from mtl_jax.mixtures.table import MixtureRow, mixture_table

__all__ = [
    "DATA_FOLDER_VARIABLE",
    "MixtureRow",
    "build_mixture",
    "check_split",
    "count_examples",
    "dataset_rate",
    "dataset_total_rate",
    "examples_rate",
    "expand",
    "held_out",
    "leave_one_out",
    "load_modules",
    "mixture_table",
    "provider",
    "rates_of",
    "task_names",
    "training_rates",
    "unimax_shares",
    "vocabulary",
]
