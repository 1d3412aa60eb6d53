"""Real jobs of two processes as launchers start them, found by JAX, and how such jobs end.

They only talk: there is no model and no data, so that nothing but JAX is loaded.
"""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import test_train
from test_processes import assert_ended_for_the_other

pytestmark = pytest.mark.slow

_TALK = """
import sys, time, types
from mtl_jax import cli, config, processes, quiet_tensorflow

def talk(args):
    print(processes.gather(processes.place()), flush=True)
    for _ in range(1000):
        processes.gather("still here")
        time.sleep(0.05)

config.load_args = quiet_tensorflow.load = lambda *args: None
sys.modules["mtl_jax.train"] = types.SimpleNamespace(evaluate_main=talk)
sys.exit(cli.main(["eval", *sys.argv[1:]]))
"""

# Stands in for the package of this name: what MPI would tell is in files and variables.
_MPI = """
import os, pathlib, time

COMM_TYPE_SHARED = "same machine"

class Everybody:
    def Get_rank(self):
        return int(os.environ["OMPI_COMM_WORLD_RANK"])

    def Get_size(self):
        return int(os.environ["OMPI_COMM_WORLD_SIZE"])

    def Split_type(self, kind):
        return self

    def bcast(self, value, root):
        told = pathlib.Path(__file__).with_name("told")
        if self.Get_rank() == root:
            told.with_suffix(".new").write_text("127.0.0.1:" + value.split(":")[1])
            told.with_suffix(".new").rename(told)
        while not told.exists():
            time.sleep(0.01)
        return told.read_text()

COMM_WORLD = Everybody()
"""


def start(flags=(), **variables):
    """One process of `mtl-jax eval` that talks instead; with a launcher's variables."""
    environment = test_train.environment() | {"JAX_NUM_CPU_DEVICES": "1"} | variables
    return subprocess.Popen(
        [sys.executable, "-c", _TALK, "--process_timeout=5", *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def by_flags(folder):
    job = [f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2"]
    return [start([*job, f"--process_id={i}"]) for i in range(2)]


def by_slurm(folder):
    job = {"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1"}
    job["JAX_COORDINATOR_PORT"] = free_port()
    return [start(**job, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]


def by_mpi(folder, **more):
    job = {"OMPI_COMM_WORLD_SIZE": "2", "JAX_COORDINATOR_PORT": free_port()} | more
    name = "OMPI_COMM_WORLD_{}RANK".format
    return [start(**job, **{name(""): str(i), name("LOCAL_"): str(i)}) for i in range(2)]


def by_open_mpi_4(folder):
    return by_mpi(folder, OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://127.0.0.1:34911")


def by_open_mpi_5(folder):
    """Within a job of SLURM, whose variables say the same to all that `mpirun` starts."""
    (folder / "mpi4py").mkdir()
    (folder / "mpi4py" / "__init__.py").touch()
    (folder / "mpi4py" / "MPI.py").write_text(_MPI)
    path = os.pathsep.join([str(folder), test_train.environment()["PYTHONPATH"]])
    return by_mpi(folder, PYTHONPATH=path, SLURM_PROCID="0", SLURM_NTASKS="2")


def heard(process):
    """The next line, apart from the notices of what carries the messages."""
    return next(line for line in process.stdout if not line.startswith("[Gloo]"))


@pytest.mark.parametrize(
    ("launch", "sent", "to"),
    [
        (by_flags, signal.SIGTERM, 0),
        (by_slurm, signal.SIGTERM, 1),
        (by_open_mpi_4, signal.SIGSTOP, 0),
        (by_open_mpi_5, signal.SIGSTOP, 1),
    ],
)
def test_processes_find_one_another_and_none_outlives_the_other(tmp_path, launch, sent, to):
    job = launch(tmp_path)
    try:
        assert [heard(process) for process in job] == ["['0 of 2', '1 of 2']\n"] * 2
        job[to].send_signal(sent)
        before = time.monotonic()
        _, said = job[1 - to].communicate(timeout=30)
        seconds, status = time.monotonic() - before, job[1 - to].returncode
        assert_ended_for_the_other(status, said, 1 - to)
        if sent == signal.SIGTERM:  # evaluation has nothing to save
            assert job[to].wait(timeout=5) == -signal.SIGTERM
        else:  # only its silence tells
            assert status == -signal.SIGABRT
            assert seconds < 15  # --process_timeout is 5
    finally:
        for process in job:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_waits_in_vain_for_another_says_so(number):
    job = [f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2"]
    process = start([*job, f"--process_id={number}", "--process_start_timeout=3"])
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert said.startswith("mtl-jax eval: The processes of the job did not find one another at 127")
    assert "Was every process started, within 3 s of the first" in said
    assert said.count("\n") == 1
