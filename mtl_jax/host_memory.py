"""Memory of programs that run on a CPU: kept from one step to the next."""

import ctypes

# Of glibc's <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_BYTES = 2**31 - 1  # the most that mallopt takes


def keep() -> bool:
    """Has the C library keep freed blocks of up to 2 GiB instead of giving them back.

    XLA allocates the temporaries of a CPU's program anew each time it is run. glibc gets such a
    block from the kernel and gives it back, and so the kernel clears every page of it in every
    step: a sixth of the time of a step of T5 1.1 small (benchmarks/README.md). The process is no
    larger than at the peak of a step. It acts on what the main thread allocates, so JAX must run
    programs there (`sharding.configure_jax`).

    Returns:
      Whether this C library could be told; others than glibc cannot.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _BYTES) and mallopt(_TRIM_THRESHOLD, _BYTES))
