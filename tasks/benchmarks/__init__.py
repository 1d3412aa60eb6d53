"""Real benchmarks: their data sets, prompts, metrics and citations.

Importing this package registers nothing: `mtl_jax.tasks.library` and `mtl_jax.tasks.multilingual`
do.
"""
