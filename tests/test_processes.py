"""Jobs of several processes: real ones over loopback, and how they find one another."""

import argparse
import importlib.machinery
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
import test_train

from mtl_jax import processes, sharding
from mtl_jax.checkpoint import Checkpointer
from mtl_jax.errors import UserError
from mtl_jax.sharding import MeshConfig

STEPS = 6
# Two shards in every run, so that all read the same batches.
VALUES = {"Run__steps": STEPS, "Checkpoint__every": 3, "Data__num_shards": 2}


def start_job(folder, count, *, devices=4, program=("-m", "mtl_jax"), own=None, **changes):
    """`mtl-jax train` as so many processes with `devices` devices in all.

    Another `program` of Python takes the same flags; `own` gives more of the environment of a
    process by its number and the number of processes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = test_train.flags(folder, **(VALUES | changes))
    environment = test_train.environment() | {"JAX_NUM_CPU_DEVICES": str(devices // count)}
    job = ["--process_timeout=20", "--process_start_timeout=120"]
    if count > 1:
        job += [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}"]
    return [
        subprocess.Popen(
            [sys.executable, *program, *flags, *job, *[f"--process_id={i}"] * (count > 1)],
            env=environment | (own(i, count) if own else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(job, seconds=300):
    """What each process said on standard error, once all have ended."""
    return [process.communicate(timeout=seconds)[1] for process in job]


def run(folder, count, **changes):
    """As `start_job`, to its end."""
    job = start_job(folder, count, **changes)
    said = finish(job)
    assert [process.returncode for process in job] == [0] * count, said
    return said


def told(folder):
    """(step, loss) of every line, and results without what depends on the clock."""
    lines = test_train.lines(folder / "metrics.jsonl")
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    results = folder / "results.jsonl"
    return losses, test_train.lines(results) if results.exists() else []


def assert_the_same_losses(folder, other):
    """But for the order of sums over devices; each step once."""
    steps, losses = zip(*told(folder)[0], strict=True)
    expected_steps, expected = zip(*told(other)[0], strict=True)
    assert steps == expected_steps == tuple(range(1, STEPS + 1))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def assert_ended_for_the_other(status, said, number):
    """By our words where a computation fails for it, by JAX's where JAX notices first."""
    if status == 1:
        assert f"process {number} of 2 stops" in said
        assert "another process has ended" in said
    else:
        assert status == -signal.SIGABRT, said
        assert "the JAX distributed service detected fatal errors" in said


def wait_for_a_step(folder, job):
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text()):
        alive = all(process.poll() is None for process in job)
        assert alive, finish(job)
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(folder, 1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "mesh"),
    [(2, {"Mesh__fsdp": 2, "Mesh__tensor": 2}), (4, {"Mesh__tensor": 2})],
    ids=["2_fsdp_tensor", "4_two_to_a_row"],
)
def test_several_processes_train_evaluate_and_save_as_one(tmp_path, alone, count, mesh):
    # In the last case two processes hold the same rows.
    said = run(tmp_path / "run", count, **mesh)
    assert_the_same_losses(tmp_path / "run", alone)
    assert told(tmp_path / "run")[1] == told(alone)[1]
    assert (tmp_path / "run/data.json").read_text() == (alone / "data.json").read_text()
    assert not any(said[1:]), "only the first process speaks"


@pytest.mark.slow
def test_any_number_of_processes_and_devices_goes_on_with_a_run(tmp_path, alone):
    run(tmp_path / "run", 2, devices=4, Run__steps=2)
    run(tmp_path / "run", 4, devices=8, Run__steps=4, Mesh__fsdp=4)
    run(tmp_path / "run", 1, devices=1)
    assert_the_same_losses(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_process_dies_the_others_stop_and_say_so(tmp_path, killed):
    job = start_job(tmp_path / "run", 2, Run__steps=100_000, Eval__tasks="()")
    wait_for_a_step(tmp_path / "run", job)
    job[killed].send_signal(signal.SIGKILL)
    said = finish(job, 60)[1 - killed]
    assert_ended_for_the_other(job[1 - killed].returncode, said, 1 - killed)


_FULL = """
import errno, os, sys
from mtl_jax import checksums, cli
from orbax.checkpoint._src.checkpointers import async_checkpointer

def failing(true):
    def fail(where, *rest, **named):
        if "checkpoints/6" in str(where):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return true(where, *rest, **named)
    return fail

if sys.argv[-1] == "--process_id=@":
    if "@" == "0":  # which lists the files that all have written
        checksums.write = failing(checksums.write)
    else:
        name = "_background_wait_for_commit_futures"
        setattr(async_checkpointer, name, failing(getattr(async_checkpointer, name)))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_save_that_fails_in_one_process_ends_the_job(tmp_path, failing):
    """Orbax lets the others wait for it, for up to twenty minutes."""
    changes = {"Run__steps": 100_000, "Checkpoint__every": 3, "Eval__tasks": "()"}
    program = ("-c", _FULL.replace("@", str(failing)))
    job = start_job(tmp_path / "run", 2, program=program, **changes)
    wait_for_a_step(tmp_path / "run", job)
    said = finish(job, 90)
    assert 0 not in [process.returncode for process in job], said
    assert f"process {failing} of 2 stops: Could not save the checkpoint of step 6" in said[failing]
    assert "no space left on the device" in said[failing]
    with Checkpointer(tmp_path / "run" / "checkpoints", read_only=True) as reader:
        assert reader.steps() == [3]
        reader.verify(3)


@pytest.mark.slow
def test_a_mistake_in_one_process_ends_it_at_once(tmp_path):
    job = start_job(tmp_path / "run", 2, Data__mixture="tinny")
    said = finish(job, 120)
    assert [process.returncode for process in job] == [1, 1]
    assert "Did you mean 'tiny'" in said[0]


def arguments(**given):
    values = dict.fromkeys(("coordinator_address", "num_processes", "process_id"))
    timeouts = {"process_start_timeout": 5, "process_timeout": 10}
    return argparse.Namespace(command="eval", **(values | timeouts | given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_processes": 2}, "needs --coordinator_address too"),
        ({"coordinator_address": "host", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
        ({"coordinator_address": "h:1", "num_processes": 2, "process_id": 2}, "one of 0 to 1"),
    ],
)
def test_half_an_address_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        processes.start(arguments(**given))


def test_an_address_may_stand_in_the_environment(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES is no number: 'two'"):
        processes.start(arguments())


def test_nothing_happens_to_a_process_that_is_alone(monkeypatch):
    monkeypatch.setattr(processes, "launcher", lambda environment: "")
    processes.start(arguments())
    assert processes.gather({"a": 1}) == [{"a": 1}]
    assert not processes.several()


POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "SLURM"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, ""),  # an interactive shell
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        # `mpirun` within a job of SLURM, whose variables are the same for all.
        ({"OMPI_COMM_WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "the TPU pod"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        (POD, "Kubernetes"),
        (POD | {"TPU_WORKER_HOSTNAMES": "a,b"}, "the TPU pod"),
        (POD | {"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
            "",
        ),  # a pod of no job, or of one that is not indexed
        ({}, ""),
    ],
)
def test_what_started_the_processes(environment, found):
    assert processes.launcher(environment) == found


@pytest.fixture
def asked(monkeypatch):
    """A pod of an indexed job; returns with what JAX was asked to join a job."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    monkeypatch.setattr(processes, "launcher", lambda environment: "Kubernetes")
    for name, value in POD.items():
        monkeypatch.setenv(name, value)
    return calls


def test_pods_of_an_indexed_job_find_one_another_by_the_cluster(asked, monkeypatch):
    package = types.ModuleType("kubernetes")
    package.__spec__ = importlib.machinery.ModuleSpec("kubernetes", None)
    monkeypatch.setitem(sys.modules, "kubernetes", package)
    processes.start(arguments())
    # Its own patience ends first.
    assert asked == [{"initialization_timeout": 35, "heartbeat_timeout_seconds": 10}]

    class ConfigException(Exception):
        """As that of the package `kubernetes`, where a pod has no account."""

    def refuse(**given):
        raise ConfigException("Service token file does not exist.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(UserError, match=r"that Kubernetes names \(Service token file does not"):
        processes.start(arguments())


def test_pods_that_cannot_ask_the_cluster_do_not_all_work_alone(asked, monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pod 3 of an indexed Kubernetes job.*pip install"):
        processes.start(arguments())
    processes.start(arguments(num_processes=1))  # wanted
    assert not asked
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "first:8476")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", POD["JOB_COMPLETION_INDEX"])
    processes.start(arguments())
    assert (asked[0]["process_id"], asked[0]["num_processes"]) == (3, 4)


def test_open_mpi_5_without_its_package_is_told_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # as if it were not installed
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"one of 4 processes of Open MPI 5.*pip install mpi4py"):
        processes.start(arguments())
    processes.start(arguments(num_processes=1))  # alone is wanted


def test_alone_there_is_one_reader():
    assert sharding.readers(sharding.make_mesh(MeshConfig(tensor=2))) == (0, 1)


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_saves_and_goes_on_bit_by_bit(tmp_path):
    # It saves all the time: Orbax itself used to ask then, with the number of a step that is past.
    changes = {"Run__steps": 30, "Checkpoint__every": 1, "Eval__tasks": "()"}
    job = start_job(tmp_path / "run", 2, **changes)
    wait_for_a_step(tmp_path / "run", job)
    job[1].send_signal(signal.SIGTERM)  # one is enough
    said = finish(job, 120)
    assert [process.returncode for process in job] == [75, 75], said
    assert "told to stop: saved at step" in said[0]
    changes["Checkpoint__every"] = 0  # the rest is quicker without
    run(tmp_path / "run", 2, **changes)
    run(tmp_path / "whole", 2, **changes)
    assert told(tmp_path / "run")[0] == told(tmp_path / "whole")[0]
