"""mtl_jax: multi-task T5 for JAX."""

__version__ = "0.1.0"
