"""Loads TensorFlow, which only reads data here, without its start-up notices and off the GPUs."""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

# What TensorFlow's C++ says at import and at the first operation, whatever its log level is set
# to: about its build, the processor and graphics drivers that are not needed.
_NOTICES = re.compile(
    r"WARNING: All log messages before absl::InitializeLog\(\)"
    r"|[IWE]\d{4} [^\]]*\b(port|util_port|cudart_stub|cpu_feature_guard|cuda_platform"
    r"|cuda_executor|cuda_diagnostics|cuda_fft|cuda_dnn|cuda_blas|computation_placer)\.cc:\d+\]"
    r"|To enable the following instructions: .* rebuild TensorFlow"
)


def load() -> None:
    """Imports TensorFlow and starts its runtime; other lines on stderr are shown afterwards.

    A TensorFlow that is already loaded is left as it is.
    """
    if "tensorflow" in sys.modules:
        return
    with _without_notices():
        import tensorflow as tf

        # Or TensorFlow would take the memory that JAX needs.
        tf.config.set_visible_devices([], "GPU")
        tf.constant(0) + 1  # the runtime starts, and speaks, at the first operation


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    """Holds back what anyone writes to file descriptor 2, then shows all but the notices."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            lines = held.read().decode(errors="replace").splitlines(keepends=True)
            os.write(2, "".join(line for line in lines if not _NOTICES.match(line)).encode())
