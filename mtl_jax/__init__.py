"""mtl_jax: multi-task T5 for JAX.

`mtl_jax.load(DIR)` gives a trained model that generates, scores and embeds texts
(`mtl_jax.inference.load`); the command `mtl-jax` does everything else.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # JAX takes seconds to import, and the version and the command line do without it.
    if name == "load":
        from mtl_jax.inference import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
