"""A compiler that computes wrongly must not train anyone's model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import functools
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# jaxlib 0.10.2 gets this wrong by 0.3 on the CPU: jax-ml/jax#39103.
norm = lambda x: x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
x = jax.random.normal(jax.random.key(0), (32, 32, 64))
c = jax.random.normal(jax.random.key(1), (4, 32, 32, 64))
backward = lambda c: jax.vjp(norm, x)[1](c)[0]
each = jnp.stack([backward(one) for one in c])
error = float(jnp.abs(jax.jit(jax.vmap(backward))(c) - each).max())
assert error < 1e-4, f"jit(vmap(vjp(norm))) is off by {error}"

# The derivative in closed form: (c - y mean(c y)) / rms, y = norm(x).
x, c = np.asarray(x, np.float64), np.asarray(c[0], np.float64)
rms = np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
y = x / rms
np.testing.assert_allclose(each[0], (c - y * (c * y).mean(-1, keepdims=True)) / rms, atol=1e-4)

# The golden loss and gradient norm of T5X, in the optimised code that users run.
import golden
import optax
from mtl_jax import objective

cfg = golden.config("1.1")
settings = objective.StepConfig(z_loss=1e-4)
measure = lambda p: objective.loss_sum(cfg, settings, 1, p, golden.batch())[0]
loss, gradient = jax.jit(jax.value_and_grad(measure))(golden.params(cfg))
np.testing.assert_allclose(loss, 50.85169, rtol=2e-6)
np.testing.assert_allclose(optax.tree.norm(gradient), 70.82707, rtol=1e-5)
"""


@pytest.mark.slow
def test_the_compiler_with_its_optimisations_computes_rightly():
    """In a process of its own, for the other tests compile without optimisation."""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
