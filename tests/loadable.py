"""A tiny random model with a byte vocabulary, saved as a run directory keeps it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mtl_jax import model, tokenizer
from mtl_jax.checkpoint import Checkpointer

CFG = model.T5Config(
    vocab_size=264,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=2,
    num_decoder_layers=2,
)


@functools.cache
def params():
    """Weights large enough for texts to differ, which are letters and end soon."""
    fresh = jax.jit(functools.partial(model.init, CFG))(jax.random.key(0))
    tree = jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 1 else leaf, fresh)
    kernel = tree["decoder"]["logits_dense"]["kernel"]
    letters = jnp.arange(3 + ord("a"), 3 + ord("z") + 1)
    # All other logits are 0, and the largest of so many is above.
    weights = jnp.zeros((1, CFG.vocab_size)).at[0, letters].set(1.0).at[0, 1].set(1.5)
    tree["decoder"]["logits_dense"]["kernel"] = kernel * weights
    return tree


def save(folder, step=7):
    """Writes `folder/checkpoints/step` and `folder/tokenizer`."""
    with Checkpointer(folder / "checkpoints") as checkpointer:
        meta = {"model": dataclasses.asdict(CFG), "task_ids": {}}
        checkpointer.save(step, {"params": params()}, {}, meta)
    (folder / tokenizer.FOLDER).mkdir()
    text = tokenizer.config_text("ByT5Tokenizer", 0)
    (folder / tokenizer.FOLDER / tokenizer.CONFIG).write_text(text)
    return folder
