"""The library of real benchmarks as SeqIO tasks: GLUE to MMLU, with prompts of our own.

Importing this module registers a task `{dataset}_{prompt}` for every data set and prompt of
docs/tasks.md, and a mixture for each benchmark (`glue`, `super_glue`, `bbh`, `mmlu`, ...). No rows
are read: a data set is sought in the data folder, in TFDS and with Hugging Face datasets when a
task of it is read (`benchmarks.origins`). The vocabulary is T5's unless MTL_JAX_VOCABULARY names
another (`benchmarks.features`).
"""

from mtl_jax.tasks.benchmarks.catalogue import DATASETS
from mtl_jax.tasks.benchmarks.features import chosen_features
from mtl_jax.tasks.benchmarks.registering import register

MIXTURES = register(DATASETS, chosen_features())
