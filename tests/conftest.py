"""Strict switches for every test: eight CPU devices, no silent broadcasting.

Warnings are errors, too (pyproject.toml).
"""

import importlib.metadata
import os
import pathlib

# Before the first import of jax anywhere: tests run on the CPU unless the caller chose a platform.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Compiling is most of the time of these tests, and code that runs once need not be fast: without
# optimisation they take a quarter of it. `XLA_FLAGS= pytest` tests the code that users run.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # Later versions do not know this flag, and would end the process.
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith("0.10."),
)

import jax
import pytest

from mtl_jax import row_files

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)


def _data_folder() -> tuple[pathlib.Path | None, str]:
    """Returns the data folder, or None and the reason why tests that need it are skipped."""
    value = os.environ.get("MTL_JAX_DATA", "")
    if not value:
        return None, "needs the data folder: set MTL_JAX_DATA"
    folder = pathlib.Path(value)
    if not folder.is_dir():
        return None, f"needs the data folder, but MTL_JAX_DATA={value} is not a folder"
    return folder.resolve(), ""


# Minutes each. They come first, or one process of tests is left with one of them at the end.
LONG_FILES = ("test_processes", "test_quickstart", "test_sweep_processes", "test_reliability_runs")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG_FILES)
    folder, reason = _data_folder()
    for item in items:
        if item.get_closest_marker("data") and folder is None:
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
            item.add_marker(pytest.mark.skip(reason="needs a GPU: jax sees none"))


@pytest.fixture(scope="session")
def data_folder() -> pathlib.Path:
    """The data folder of MTL_JAX_DATA; for tests marked `data`."""
    folder, reason = _data_folder()
    if folder is None:
        pytest.skip(reason)
    return folder


@pytest.fixture(autouse=True)
def no_corrupt_rows():
    """What one test lets files have (`Data.max_corrupt`) is kept for the process."""
    yield
    row_files.tolerate("", 0)
