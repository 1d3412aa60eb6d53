"""What the attention benchmarks compare, and on which inputs."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import attention

HEAD_DIM = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of attention over themselves, as in an encoder (or, causal, a decoder) of T5."""

    rows: int
    heads: int
    length: int
    causal: bool = False
    segments: int = 1  # examples packed into a row

    @property
    def name(self) -> str:
        """(rows, heads, length) and what is special."""
        packed = f", {self.segments} packed" if self.segments > 1 else ""
        causal = ", causal" if self.causal else ""
        return f"({self.rows}, {self.heads}, {self.length}){causal}{packed}"

    def flops(self) -> float:
        """Of forward and backward pass: 14 products of one head dimension per pair that is seen."""
        pairs = self.rows * self.heads * self.length**2 / self.segments
        return 14 * HEAD_DIM * pairs / (2 if self.causal else 1)


def inputs(case: Case, dtype) -> tuple:
    """(q, k, v [B, T, H, K], table [32, H], segments [B, T], cotangent of the output)."""
    random = np.random.RandomState(0)
    shape = (case.rows, case.length, case.heads, HEAD_DIM)
    # Logits of order 1 to 10, as in a trained model.
    q, k, v, do = (random.randn(*shape) * scale for scale in (0.3, 1.0, 1.0, 1.0))
    table = jnp.asarray(random.randn(32, case.heads), jnp.float32)
    row = np.arange(case.length) * case.segments // case.length + 1
    segments = jnp.asarray(np.tile(row, (case.rows, 1)), jnp.int32)
    q, k, v, do = (jnp.asarray(x, dtype) for x in (q, k, v, do))
    return q, k, v, table, segments, do


def ours(impl: str, case: Case) -> Callable:
    """`attention.attend` with this implementation: (q, k, v, table, segments) -> output."""

    def run(q, k, v, table, segments):
        return attention.attend(
            q,
            k,
            v,
            table,
            segments,
            segments,
            causal=case.causal,
            bidirectional=not case.causal,
            impl=impl,
        )

    return run


def cudnn(case: Case) -> Callable:
    """Attention of cuDNN through JAX, with the bias built from the table as it wants it."""

    def run(q, k, v, table, segments):
        bias = attention.relative_bias(
            table, q.shape[1], k.shape[1], bidirectional=not case.causal, max_distance=128
        )
        call = functools.partial(
            jax.nn.dot_product_attention,
            *(q, k, v),
            bias=bias.astype(q.dtype)[None],
            scale=1.0,
            implementation="cudnn",
        )
        if case.segments == 1:
            return call(is_causal=case.causal)
        seen = (segments[:, :, None] == segments[:, None, :])[:, None]
        if case.causal:
            seen &= jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))[None, None]
        return call(mask=seen)

    return run


def with_gradients(run: Callable, *, table: bool = True) -> Callable:
    """Forward and backward pass; without `table` the bias gets no gradient."""

    def both(q, k, v, table_NH, segments, do):
        def forward(q, k, v, table_NH):
            return run(q, k, v, table_NH, segments)

        if table:
            o, backward = jax.vjp(forward, q, k, v, table_NH)
        else:
            o, backward = jax.vjp(lambda q, k, v: forward(q, k, v, table_NH), q, k, v)
        return o, *backward(do)

    return both


def errors(found, reference) -> list[float]:
    """Norm of the difference over the norm, of each output."""
    wide = lambda x: np.asarray(x, np.float64)  # noqa: E731
    return [
        float(np.linalg.norm(wide(a) - wide(b)) / np.linalg.norm(wide(b)))
        for a, b in zip(found, reference, strict=True)
    ]
