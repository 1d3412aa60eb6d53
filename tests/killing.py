"""Trains a run that is killed again and again, in little time: a program for tests.

    python killing.py FOLDER SEED KILLS STEPS FLAG...

Python and its packages are loaded once; every start of the run is a fork of this process, which
has touched no device. FOLDER/whole is never stopped. FOLDER/killed gets SIGKILL so many times, one
time in three at any moment before its first step and else at any moment of the time that three
steps take, most of which is spent saving; then it may end. Prints one JSON line: what was under way
at each kill.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from mtl_jax import cli, train  # noqa: F401  (loads all that a start needs)


def start(flags, folder, steps):
    """The process of one start."""
    number = os.fork()
    if number:
        return number
    status = 1
    with contextlib.suppress(BaseException), (folder.parent / "log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        status = cli.main([*flags, f"--gin.Run.directory={folder}", f"--gin.Run.steps={steps}"])
    os._exit(status)


def ended(number):
    """Whether a start has ended; it must not be asked again."""
    return os.waitpid(number, os.WNOHANG)[0] == number


def writing(folder):
    """The checkpoints that are being written."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(p.name for p in (folder / "checkpoints").iterdir() if "-tmp" in p.name)
    return []


def complete(folder):
    with contextlib.suppress(FileNotFoundError):
        return {p.name for p in (folder / "checkpoints").iterdir() if p.name.isdigit()}
    return set()


def stepped(folder):
    """Changes with every step: the account of time is replaced with every line of metrics."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "ledger.json").stat().st_mtime_ns
    return 0


def kill(number, folder, wait, from_step):
    """Kills a start after so many seconds, counted from its beginning or from its first step.

    Returns what it was doing; None: it has ended before.
    """
    before, first = complete(folder), stepped(folder)
    began = time.monotonic()
    counted = None if from_step else began
    while not ended(number):
        if counted is None and stepped(folder) != first:
            counted = time.monotonic()
        if counted is not None and time.monotonic() > counted + wait:
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
            new = complete(folder) - before
            return {"from_step": from_step, "saving": writing(folder), "saved": len(new)}
        time.sleep(0.001)
    return None


def main():
    folder, seed, kills, steps, *flags = sys.argv[1:]
    folder, draw, kills = Path(folder), random.Random(int(seed)), int(kills)
    for name, count in (("compiled", 1), ("whole", steps)):
        began = time.monotonic()
        number = start(flags, folder / name, count)
        while not stepped(folder / name):
            assert not ended(number), (folder / "log").read_text()[-3000:]
            time.sleep(0.01)
        until_a_step = time.monotonic() - began
        _, status = os.waitpid(number, 0)
        assert status == 0, (folder / "log").read_text()[-3000:]
    three_steps = 3 * (time.monotonic() - began - until_a_step) / int(steps)
    done = []
    for turn in range(kills):
        number = start(flags, folder / "killed", steps)
        from_step = turn % 3 > 0
        seconds = draw.uniform(0, three_steps if from_step else until_a_step)
        done.append(kill(number, folder / "killed", seconds, from_step))
        if done[-1] is None:
            break
    _, status = os.waitpid(start(flags, folder / "killed", steps), 0)
    print(json.dumps({"status": status, "kills": done, "until_a_step": until_a_step}))


if __name__ == "__main__":
    main()
