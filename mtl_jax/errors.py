"""Errors that a user can mend, told in one clear message."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: the message names the field or file and says what to do.

    Entry points show it as one line without a traceback.
    """


class Stopped(Exception):
    """A run that was told to stop has saved, and the same command continues it.

    The command line shows it as one line and exits with status 75.
    """


def suggest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Returns `" Did you mean 'a' or 'b'?"` for the known names nearest to `name`, or `""`."""
    near = difflib.get_close_matches(name, list(known), n=count, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
