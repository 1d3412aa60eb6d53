"""Sweeps that are killed, and sweeps of several processes, against one that is left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import loadable
import pytest

pytestmark = pytest.mark.slow

PROMPTS = 12
VALUES = {
    "Data.task_modules": "('sweep_tasks',)",
    "Eval.tasks": "('nli_*', 'ragged_*', 'last_*')",
    "Eval.inputs_length": 40,
    "Eval.targets_length": 8,
    "Eval.max_decode_length": 4,
    "Eval.batch_size": 4,
    "Eval.max_shapes": 3,
    "Sweep.protocols": "('t0', 'pmi', 'lm_eval', 'generate')",
}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    loadable.save(folder, step=7)
    with loadable.Checkpointer(folder / "checkpoints") as checkpointer:
        checkpointer.save(9, {"params": loadable.params()}, {}, checkpointer.meta(7))
    return folder


def start(toys, root):
    values = VALUES | {"Run.directory": root, "Sweep.checkpoints": f"('{toys}@*',)"}
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "SWEEP_TASKS_PROMPTS": str(PROMPTS),
        "JAX_NUM_CPU_DEVICES": "1",
    }
    command = [sys.executable, "-m", "mtl_jax", "sweep"]
    return subprocess.Popen(
        [*command, *(f"--gin.{name}={value}" for name, value in values.items())],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def done(root):
    return len(list(root.glob("cells/*/*/*/results.jsonl")))


def wait_for(root, cells, process):
    while done(root) < cells:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(toys):
    root = toys.parent / "undisturbed"
    process = start(toys, root)
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert "Report:" in out
    assert done(root) == 2 * 3 * PROMPTS
    return root


def contents(root):
    """The table, and everything that the model said, by path."""
    passes = [p for p in root.glob("cells/*/*/*/*.jsonl")]
    return {str(p.relative_to(root)): p.read_bytes() for p in [root / "results.jsonl", *passes]}


def test_a_sweep_that_is_killed_goes_on(toys, undisturbed):
    root = toys.parent / "killed"
    process = start(toys, root)
    wait_for(root, 5, process)
    process.kill()
    process.communicate()
    before = done(root)

    process = start(toys, root)
    wait_for(root, before + 20, process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 130, error
    assert "cells are done; run the same command again to go on" in error
    assert before + 20 <= done(root) < 2 * 3 * PROMPTS

    process = start(toys, root)
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert contents(root) == contents(undisturbed)
    # Nothing is left of those that were killed.
    assert not list(root.rglob("claim.json"))


def test_four_processes_make_what_one_makes(toys, undisturbed):
    root = toys.parent / "shared"
    processes = [start(toys, root) for _ in range(4)]
    wait_for(root, 3, processes[0])
    processes[3].kill()  # its cells are taken over
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes[:3]] == [0, 0, 0], said
    assert contents(root) == contents(undisturbed)
    assert sum("Report:" in out for out, _ in said) >= 1
