"""Parameters by formula and the golden batch: numbers that no random generator can move."""

import functools

import jax
import numpy as np

from mtl_jax import objective
from mtl_jax.model import T5Config, abstract_params

ENCODER = np.array(
    [[18, 7, 28, 25, 6, 22, 26], [10, 31, 28, 17, 26, 0, 0], [17, 13, 29, 0, 0, 0, 0]]
)
TARGETS = np.array([[19, 10, 15, 3, 14, 1], [29, 9, 22, 1, 0, 0], [27, 1, 0, 0, 0, 0]])


def config(version: str, **changes) -> T5Config:
    """The small T5 of the golden numbers, version "1.1" or "1.0"."""
    kind = (
        {"mlp_activations": ("gelu", "linear")}
        if version == "1.1"
        else {"mlp_activations": ("relu",), "logits_via_embedding": True}
    )
    shape = dict(vocab_size=32, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32)
    layers = dict(num_encoder_layers=2, num_decoder_layers=2)
    return T5Config(**(shape | layers | kind | changes))


def t5x_paths(cfg: T5Config) -> dict[str, tuple[tuple[str, ...], int | None, tuple[int, ...]]]:
    """T5X path -> (our path, index of the layer or None, shape)."""
    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(cfg)):
        keys = tuple(entry.key for entry in path)
        if "layers" in keys:
            for n in range(leaf.shape[0]):
                name = "/".join(f"layers_{n}" if k == "layers" else k for k in keys)
                out[name] = (keys, n, leaf.shape[1:])
        else:
            out["/".join(keys)] = (keys, None, leaf.shape)
    return out


def params(cfg: T5Config) -> dict:
    """Parameter i of the sorted T5X paths is made from numpy's RandomState(1000 + i)."""
    tree: dict = {}
    for i, (name, (keys, _, shape)) in enumerate(sorted(t5x_paths(cfg).items())):
        r = np.random.RandomState(1000 + i).randn(*shape)
        if name.endswith("scale"):
            r = 1 + 0.1 * r
        elif name.endswith("rel_embedding"):
            r = 0.5 * r
        elif name.endswith("kernel"):
            r = r / np.sqrt(shape[0])
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node.setdefault(keys[-1], []).append(r.astype(np.float32))
    stack = lambda leaf, path: np.stack(leaf) if "layers" in path else leaf[0]  # noqa: E731

    def finish(node, path=()):
        if isinstance(node, list):
            return stack(node, path)
        return {key: finish(child, (*path, key)) for key, child in node.items()}

    return finish(tree)


def batch() -> dict[str, np.ndarray]:
    """The golden rows, unpacked, in the layout of the data stream."""
    inputs = np.zeros_like(TARGETS)
    inputs[:, 1:] = TARGETS[:, :-1]
    weights = (TARGETS > 0).astype(np.float32)
    task = lambda tokens: (tokens > 0).astype(np.int32)  # noqa: E731
    return {
        "encoder_input_tokens": ENCODER.astype(np.int32),
        "encoder_segment_ids": task(ENCODER),
        "encoder_task_ids": task(ENCODER),
        "decoder_input_tokens": inputs.astype(np.int32),
        "decoder_target_tokens": TARGETS.astype(np.int32),
        "decoder_segment_ids": task(TARGETS),
        "decoder_task_ids": task(TARGETS),
        "decoder_loss_weights": weights,
    }


def pack_last_two(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows 2 and 3 of `batch` as two segments of one row, without the padding between them."""
    packed = {}
    for name, x in rows.items():
        side = name.split("_")[0]
        real = [rows[f"{side}_segment_ids"][row] > 0 for row in (1, 2)]
        parts = [x[row][mask] for row, mask in zip((1, 2), real, strict=True)]
        if name.endswith("segment_ids"):
            parts[1] = parts[1] * 2
        packed[name] = np.concatenate(parts)[None]
    return packed


@functools.cache
def logits(version: str) -> np.ndarray:
    """Logits_BTV of the golden batch; computed once for all test files."""
    cfg = config(version)
    return np.asarray(jax.jit(functools.partial(objective.forward, cfg))(params(cfg), batch()))
