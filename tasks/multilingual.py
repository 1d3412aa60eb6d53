"""XNLI in fifteen languages as SeqIO tasks, `xnli_sw_three_way_verdict`; mixture `xnli`.

The prompts are English, the rows are in the task's language (`TaskInfo.language`). As
`mtl_jax.tasks.library`, but the vocabulary is mT5's unless MTL_JAX_VOCABULARY names another: in
T5's, most of these languages are unknown symbols.
"""

from mtl_jax.tasks.benchmarks.catalogue import MULTILINGUAL
from mtl_jax.tasks.benchmarks.features import chosen_features
from mtl_jax.tasks.benchmarks.registering import register

MIXTURES = register(MULTILINGUAL, chosen_features("mt5"))
