"""The flags of `mtl-jax precompile`."""

import argparse

from mtl_jax.errors import UserError, suggest

PROGRAMS = ("train", "eval", "decode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags besides those of the configuration."""
    parser.add_argument(
        "--topology",
        required=True,
        metavar="TARGET",
        help="a TPU slice by its torus of chips (v5e:16x16, v4:4x4x8, v5p:2x2x1, v6e:4x4), or "
        "NVIDIA GPUs of one machine (h100:8, h200:8)",
    )
    parser.add_argument(
        "--slices",
        type=int,
        default=1,
        metavar="N",
        help="of that TPU topology, joined by a data-centre network; default: %(default)s",
    )
    parser.add_argument(
        "--only",
        default=",".join(PROGRAMS),
        metavar="NAMES",
        help="of train (a step), eval (scoring a batch) and decode (generating for one), with "
        "commas; default: %(default)s",
    )
    parser.add_argument(
        "--search",
        type=int,
        default=3,
        metavar="N",
        help="if it does not fit, compile at most N other settings to find one that does; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--without_tasks",
        action="store_true",
        help="do not load the tasks, whose data is elsewhere; only what is kept per task is then "
        "left out",
    )
    parser.add_argument("--json", default="", metavar="FILE", help="write the same as JSON")


def programs(given: str) -> list[str]:
    """The programs that `--only` names, in the order of `PROGRAMS`.

    Raises:
      UserError: none, or an unknown one.
    """
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in PROGRAMS:
            known = ", ".join(PROGRAMS)
            raise UserError(
                f"--only: unknown program {name!r}.{suggest(name, PROGRAMS)} Known: {known}."
            )
    if not names:
        raise UserError(f"--only names no program: choose of {', '.join(PROGRAMS)}.")
    return [name for name in PROGRAMS if name in names]
