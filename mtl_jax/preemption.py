"""Being told to stop: after SIGTERM a run finishes its step, saves, and ends to be continued.

Machines that may be taken away at any time, and schedulers at their time limit, send SIGTERM some
seconds before they kill.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from mtl_jax import processes


class Preemption:
    """A context inside of which SIGTERM only leaves a note."""

    def __init__(self) -> None:
        """Nothing is changed before `__enter__`."""
        self._asked = threading.Event()
        self._earlier: Any = None

    def reached(self, step: int) -> bool:
        """Whether the run shall stop after this step, or the next one that suits it.

        In a job of several processes, all of which must ask after each step, the answer is the
        same for all of them, whichever was told: true from a step on that none has passed yet.
        """
        if processes.several():
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):  # says so once
                self._asked.set()
        return self._asked.is_set()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked.set()

    def __enter__(self) -> "Preemption":
        # JAX listens itself in a job of several (processes.start); only the main thread may listen.
        alone = not processes.several()
        if alone and threading.current_thread() is threading.main_thread():
            self._earlier = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._earlier is not None:
            signal.signal(signal.SIGTERM, self._earlier)
            self._earlier = None
