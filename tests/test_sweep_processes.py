"""Sweeps that are killed, and sweeps of several processes, against one that is left alone."""

import os
import signal
import socket
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


def start(toys, root, job=(), devices=1):
    """`mtl-jax sweep`; with `job` as a part of a job of several processes."""
    values = VALUES | {"Run.directory": root, "Sweep.checkpoints": f"('{toys}@*',)"}
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "SWEEP_TASKS_PROMPTS": str(PROMPTS),
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    command = [sys.executable, "-m", "mtl_jax", "sweep"]
    return subprocess.Popen(
        [*command, *(f"--gin.{name}={value}" for name, value in values.items()), *job],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_job(toys, root, count, devices=4):
    """A job of so many processes with `devices` devices in all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}"]
    job += ["--process_timeout=20", "--process_start_timeout=120"]
    own = devices // count
    return [start(toys, root, [*job, f"--process_id={i}"], own) for i in range(count)]


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


def test_one_job_of_two_processes_and_then_four_makes_what_one_makes(toys):
    """Each batch is spread over the devices of all."""
    root, expected = toys.parent / "job", toys.parent / "four_devices"
    alone = start(toys, expected, devices=4)
    _, error = alone.communicate()
    assert alone.returncode == 0, error
    job = start_job(toys, root, 2)
    wait_for(root, 3, job[0])
    job[1].kill()
    job[1].communicate()
    said = job[0].communicate(timeout=90)
    assert job[0].returncode not in (0, None), said
    before = done(root)
    assert before < 2 * 3 * PROMPTS

    job = start_job(toys, root, 4)
    said = [process.communicate(timeout=300) for process in job]
    assert [process.returncode for process in job] == [0] * 4, said
    assert contents(root) == contents(expected)
    assert "Report:" in said[0][0]
    assert f"72 cells, {before} of them done" in said[0][1]
    assert not any("cells" in error for _, error in said[1:]), "only the first process speaks"
    assert not list(root.rglob("claim.json"))


def test_a_job_whose_processes_see_different_tasks_is_refused(toys, tmp_path):
    job = ["--num_processes=2", "--process_timeout=20", "--process_start_timeout=120"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        job.append(f"--coordinator_address=127.0.0.1:{probe.getsockname()[1]}")
    other = [*job, "--process_id=1", "--gin.Eval.limit=5"]
    processes = [start(toys, tmp_path, [*job, "--process_id=0"]), start(toys, tmp_path, other)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], said
    assert "Process 1 has another plan (72 cells) than process 0 (72)" in said[0]
    assert not (tmp_path / "plan.json").exists()
