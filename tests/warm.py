"""`mtl-jax` for tests of pages, without the seconds in which every start loads its packages.

    python warm.py FOLDER

makes FOLDER/mtl-jax, a script that asks this process for a fork of itself, which has loaded all
packages and touched no device. The fork runs the command with the script's words, folder,
environment and files. Where the environment has another value of something that packages read when
they are loaded, the script starts the real command instead.
"""

import atexit
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

READ_WHEN_LOADED = ("JAX_", "XLA_", "TF_", "PYTHON", "LD_")
LOADED = (
    *("mtl_jax.train", "mtl_jax.sweep", "mtl_jax.infer", "mtl_jax.report_main"),
    *("mtl_jax.tasks_main", "mtl_jax.interop.convert", "mtl_jax.compare", "mtl_jax.decontaminate"),
)
CLIENT = """#!{python} -SE
import json, os, socket, sys
found = {{k: v for k, v in os.environ.items() if k.startswith({prefixes})}}
if found != {known}:
    os.execv({command}, [{command}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address})
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    answer = server.recv(8)
sys.exit(int(answer) if answer else 1)
"""


@functools.cache
def folder() -> Path:
    """A folder for PATH with the script; the process behind it ends with this one."""
    made = Path(tempfile.mkdtemp(prefix="warm"))
    process = subprocess.Popen(
        [sys.executable, __file__, str(made)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    atexit.register(process.kill)
    while not (made / "mtl-jax").exists():
        if process.poll() is not None:
            raise RuntimeError(f"warm.py has ended with status {process.returncode}")
        time.sleep(0.05)
    return made


def serve(place: Path) -> None:
    """Loads everything, then forks for each command until the process that started it is gone."""
    known = {k: v for k, v in os.environ.items() if k.startswith(READ_WHEN_LOADED)}
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as the command does
    import importlib

    from mtl_jax import cli, quiet_tensorflow

    quiet_tensorflow.load()
    for name in LOADED:
        importlib.import_module(name)
    sys.path.pop(0)  # the folder of this file
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "socket"))
        listener.listen()
        listener.settimeout(2.0)
        client = CLIENT.format(
            python=sys.executable,
            prefixes=READ_WHEN_LOADED,
            known=known,
            command=repr(str(Path(sys.executable).with_name("mtl-jax"))),
            address=repr(str(place / "socket")),
        )
        new = place / "new"
        new.write_text(client)
        new.chmod(0o755)
        new.rename(place / "mtl-jax")
        while os.getppid() == parent:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            if os.fork():
                connection.close()
                continue
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            answer(connection, cli.main)
            os._exit(0)


def answer(connection: socket.socket, main) -> None:
    """Runs one command in the fork."""
    connection.settimeout(None)
    size, files, *_ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as stream:
        words, place, environment = json.loads(stream.read(int.from_bytes(size, "big")))
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    status = 1
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(str(status).encode())


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
