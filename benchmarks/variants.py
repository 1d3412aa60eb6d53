"""Variants of a train step by name: words joined by "+", such as `pallas+unroll+logits16`.

Loads neither JAX nor PyTorch: who only starts other processes needs no GPU memory.
"""

import re

# Word -> (what it configures, field, value). What no word sets is as the benchmark's model has it;
# the optimizer is AdamW.
MTL_JAX = {
    **{name: ("model", "attention", name) for name in ("auto", "naive", "xla", "pallas")},
    "scan": ("model", "scan_layers", True),
    "unroll": ("model", "scan_layers", False),
    **{name: ("model", "remat", name) for name in ("minimal", "full")},
    "float32": ("model", "dtype", "float32"),
    "logits16": ("model", "logits_dtype", "bfloat16"),
    **{name: ("optimizer", "name", name) for name in ("adamw", "adafactor")},
}
HUGGING_FACE = {
    **{name: ("step", "attention", name) for name in ("sdpa", "eager", "flex")},
    **{name: ("step", "precision", name) for name in ("float32", "autocast", "bfloat16")},
    **{name: ("step", "compiled", name) for name in ("compile", "regional")},
}
WORDS = {"mtl_jax": MTL_JAX, "hf": HUGGING_FACE}


def settings(framework: str, variant: str) -> dict[str, dict]:
    """Returns {"model" | "step" | "optimizer": {field: value}} of a variant.

    Args:
      framework: "mtl_jax" or "hf".
      variant: words of `WORDS[framework]` joined by "+"; mtl_jax also knows `chunkN`, a loss head
        in chunks of N tokens.

    Raises:
      ValueError: an unknown word, or two words for one field.
    """
    found: dict[str, dict] = {"model": {}, "step": {}, "optimizer": {}}
    for word in variant.split("+"):
        chunk = re.fullmatch(r"chunk(\d+)", word)
        if framework == "mtl_jax" and chunk:
            part, field, value = "step", "loss_chunk", int(chunk[1])
        elif word in WORDS[framework]:
            part, field, value = WORDS[framework][word]
        else:
            known = ", ".join(WORDS[framework])
            raise ValueError(f"{variant!r}: unknown word {word!r} of {framework}; known: {known}")
        if field in found[part]:
            raise ValueError(f"{variant!r}: two words for {field}")
        found[part][field] = value
    return found
