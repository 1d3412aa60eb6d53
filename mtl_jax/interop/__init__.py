"""Checkpoints of Hugging Face, T5X and our own: one way to read them, and `mtl-jax convert`."""

from mtl_jax.interop.opening import detect, load_params, open_source
from mtl_jax.interop.source import Source

__all__ = ["Source", "detect", "load_params", "open_source"]
