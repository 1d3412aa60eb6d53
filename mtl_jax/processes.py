"""A job of several processes: how they find one another, what they tell one another, how they end.

Every process runs the same program. Arrays are spread over the devices of all of them; what is
written once is written by the primary process. Whatever calls `gather` must do so in every process
and in the same order, as each waits for all others.
"""

import argparse
import glob
import importlib.util
import io
import json
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from mtl_jax.errors import UserError

# Flag and environment variable of each part of an address.
_FLAGS = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}

_GRACE = 30  # seconds that JAX would wait longer than we do

_POD, _TPU, _KUBERNETES, _MPI = "the TPU pod", "the TPU machine", "Kubernetes", "Open MPI"


class _Nowhere(io.TextIOBase):
    def write(self, text: str, /) -> int:
        return len(text)


def start(args: argparse.Namespace) -> None:
    """Joins the job that the flags, or the environment, tell of; alone: nothing happens.

    Before any computation of JAX. Sought in this order: the flags `--coordinator_address`,
    `--num_processes` and `--process_id`; their like in the environment (`JAX_NUM_PROCESSES`, ...);
    then what `launcher` finds, where JAX knows all three. One process, and nothing else given, is
    alone whatever started it.

    If the others do not come in time, the process ends here, with a message and status 1.

    Args:
      args: of a `command`, which says whether the job listens for SIGTERM.

    Raises:
      UserError: a part is missing or out of range, or JAX cannot tell where the others are.
    """
    given = {name: _given(args, name) for name in _FLAGS}
    missing = [name for name, value in given.items() if value is None]
    found = launcher(os.environ)
    if len(missing) == len(given):
        if not found:
            return
        if found == _KUBERNETES:
            _check_kubernetes(os.environ)
        given = _detection(found, os.environ)
    elif missing and given["num_processes"] == 1:
        return
    elif missing:
        raise UserError(
            f"A job of several processes needs --{missing[0]} too (or {_FLAGS[missing[0]]} in the "
            "environment): give --coordinator_address HOST:PORT of process 0, --num_processes and "
            "--process_id."
        )
    else:
        _check(given)
    _join(args, given, found)


def _join(args: argparse.Namespace, given: Mapping[str, Any], found: str) -> None:
    waiting, silence = args.process_start_timeout, args.process_timeout
    where = given.get("coordinator_address") or f"the coordinator that {found} names"

    def lost(reason: str) -> str:
        return (
            f"The processes of the job did not find one another at {where} ({reason}). Was every "
            f"process started, within {waiting} s of the first, and can it reach that address?"
        )

    def give_up() -> None:
        print(f"mtl-jax {args.command}: {lost('not all have come')}", file=sys.stderr)
        abort(1)

    # JAX's notifier keeps SIGTERM from ending a process; who does not ask it would never hear.
    listens = args.command == "train" and not args.dry_run
    jax.config.update("jax_enable_preemption_service", listens)
    detected = "process_id" not in given
    # The packages that ask a Kubernetes cluster, or MPI, have errors of their own.
    asks = detected and found in (_KUBERNETES, _MPI)
    kinds = (Exception,) if asks else (RuntimeError, ValueError)
    # Before JAX, which would end the process by SIGABRT, with words of its own.
    patience = threading.Timer(waiting, give_up)
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            **given, initialization_timeout=waiting + _GRACE, heartbeat_timeout_seconds=silence
        )
    except kinds as error:
        if detected and found == _TPU and isinstance(error, ValueError):
            return  # JAX finds no neighbours: a single machine, or one of its own kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(lost(reason)) from error
    finally:
        patience.cancel()


def _given(args: argparse.Namespace, name: str) -> Any:
    flag = getattr(args, name)
    if flag is not None:
        return flag
    value = os.environ.get(_FLAGS[name])
    if value is None or name == "coordinator_address":
        return value or None
    if not value.isdigit():
        raise UserError(f"The environment variable {_FLAGS[name]} is no number: {value!r}.")
    return int(value)


def _check(given: Mapping[str, Any]) -> None:
    address, count, number = (given[name] for name in _FLAGS)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator_address = {address!r} must be HOST:PORT.")
    if not 0 <= number < count:
        raise UserError(
            f"--process_id = {number} must be one of 0 to {count - 1}: --num_processes is {count}."
        )


def _check_kubernetes(environment: Mapping[str, str]) -> None:
    if not importlib.util.find_spec("kubernetes"):
        raise UserError(
            f"This is pod {environment['JOB_COMPLETION_INDEX']} of an indexed Kubernetes job. How "
            "many there are JAX asks the cluster, by a package that is not installed: pip install "
            "kubernetes, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID "
            "(docs/pods.md). If each pod is to work alone: --num_processes=1."
        )


def _detection(found: str, environment: Mapping[str, str]) -> dict[str, str]:
    """How JAX is to look for the others, where it would not find them by itself.

    It knows `mpirun` by a variable that Open MPI 5 no longer sets (jax-ml/jax#14576).
    """
    if found != _MPI or "OMPI_MCA_orte_hnp_uri" in environment:
        return {}
    if not importlib.util.find_spec("mpi4py"):
        raise UserError(
            f"This is one of {environment['OMPI_COMM_WORLD_SIZE']} processes of Open MPI 5 or "
            "newer. Where they are JAX asks MPI, by a package that is not installed: pip install "
            "mpi4py, or give --coordinator_address, --num_processes and --process_id "
            "(docs/pods.md). If each is to work alone: --num_processes=1."
        )
    return {"cluster_detection_method": "mpi4py"}


def launcher(environment: Mapping[str, str]) -> str:
    """What started this process as one of several, by the variables that it sets; "": nothing.

    Args:
      environment: `os.environ`.
    """

    def several(name: str) -> bool:
        return environment.get(name, "").isdigit() and int(environment[name]) > 1

    if several("OMPI_COMM_WORLD_SIZE"):  # also within a job of SLURM, whose variables it inherits
        return _MPI
    if "SLURM_PROCID" in environment and several("SLURM_NTASKS"):
        return "SLURM"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or several("MEGASCALE_NUM_SLICES"):
        return _POD
    # A TPU machine that says nothing of its neighbours: JAX asks the machine's metadata.
    on_tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    wanted = environment.get("JAX_PLATFORMS", "tpu")
    single = environment.get("TPU_WORKER_HOSTNAMES") == "localhost"
    if on_tpu and importlib.util.find_spec("libtpu") and "tpu" in wanted and not single:
        return _TPU
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "" if single else _KUBERNETES
    return ""


def primary() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def screen() -> Any:
    """Where progress is told: the standard error of the primary process; of others nowhere."""
    return sys.stderr if primary() else _Nowhere()


def gather(value: Any) -> list[Any]:
    """JSON-able values of all processes, in their order; every process gets all of them."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.array([text.size], np.int32)))
    padded = np.pad(text, (0, int(lengths.max()) - text.size))
    texts = multihost_utils.process_allgather(padded)
    return [
        json.loads(row[:length].tobytes())
        for row, length in zip(np.asarray(texts), lengths.tolist(), strict=True)
    ]


def from_primary(value: Any) -> Any:
    """The JSON-able value of the primary process, in every process; what others give is ignored."""
    return gather(value if primary() else None)[0]


def several() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def place() -> str:
    """This process in words, such as `3 of 8`; counted from 0, as the launchers do."""
    return f"{jax.process_index()} of {jax.process_count()}"


def abort(status: int) -> NoReturn:
    """Ends this process at once, as its part of the job has failed.

    An orderly end would wait for the other processes, which wait for this one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
