"""A CPU's programs find the memory of their last run again."""

import ctypes
import os
import subprocess
import sys

import pytest

from mtl_jax import host_memory

# Page faults of 20 runs of a program with 64 MiB of temporaries, as in training. Blocks of 32 MiB
# or less glibc keeps by itself, after the first.
_PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from mtl_jax import sharding
if "told" in sys.argv:
    sharding.configure_jax()
    sharding.make_mesh(sharding.MeshConfig())
x = jnp.ones((4096, 4096))
f = jax.jit(lambda x: jnp.sum(jnp.tanh(x) @ x[:, :16]))
for _ in range(3):
    f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    f(x).block_until_ready()
print(f.lower(x).compile().memory_analysis().temp_size_in_bytes)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc"
)
def test_temporaries_are_not_given_back_between_steps():
    def run(*args):
        # One device: of several each has a thread of its own.
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, *args],
            **dict(capture_output=True, text=True, timeout=120, check=True, env=environment),
        )
        return map(int, done.stdout.split())

    temporaries, faults = run("told")
    assert temporaries >= 64 * 2**20
    pages = 20 * temporaries // 4096
    # The heap may grow once more, by what lies between two blocks.
    assert faults < pages / 5
    _, otherwise = run()
    assert otherwise > pages / 2, "the test would show nothing"


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not host_memory.keep()
