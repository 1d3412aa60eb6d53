"""Whether the tensors of a checkpoint are those of a run, and what to do where they are not."""

from typing import Any

import jax

from mtl_jax.errors import UserError

PARAMS = "params/"
_NAMES_SHOWN = 5


def check(place: str, wanted: dict[str, Any], stored: dict[str, Any]) -> None:
    """Compares names, shapes and dtypes with what is on disk, before anything is read.

    Args:
      place: of the checkpoint, the start of a message.
      wanted: leaves with `shape` and `dtype` by path, of the run.
      stored: the same of the checkpoint.

    Raises:
      UserError: the first tensor that differs is named, with both shapes.
    """
    shared = wanted.keys() & stored.keys()
    differing = [name for name in shared if _describe(wanted[name]) != _describe(stored[name])]
    missing = sorted(wanted.keys() - stored.keys(), key=_params_first)
    extra = sorted(stored.keys() - wanted.keys(), key=_params_first)
    only_params = all(map(is_param, stored)) and not any(map(is_param, missing))
    if missing and only_params and not differing and not extra:
        raise UserError(
            f"{place} holds parameters but no optimizer state: start from it in a new run "
            "directory, by Run.restore_from with Run.restore_optimizer = 'drop'."
        )
    problems = []
    for name in sorted(differing, key=_params_first)[:1]:
        ours, theirs = _describe(wanted[name]), _describe(stored[name])
        problems.append(f"tensor {name} is {theirs} in the checkpoint and {ours} in the run")
    if missing:
        problems.append(f"the checkpoint lacks {_enumerate(missing)}")
    if extra:
        problems.append(f"the run has no place for {_enumerate(extra)}")
    if not problems:
        return
    different = "; ".join(problems)
    if any(map(is_param, [*differing, *missing, *extra])):
        raise UserError(
            f"{place} does not fit this run's model or optimizer: {different}. Use the "
            "configuration it was trained with, or another run directory."
        )
    if all(name.startswith("balance/") for name in [*differing, *missing, *extra]):
        raise UserError(
            f"{place} was trained with another way to share the update: {different}. Give "
            "Balance.method and Balance.by the values it was trained with, or start from its "
            "parameters in a new run directory, by Run.restore_from."
        )
    raise UserError(
        f"{place} fits this run's model, but not its optimizer: {different}. Give "
        "Optimizer.name, Optimizer.freeze and the like the values it was trained with, or "
        "start from its parameters in a new run directory, by Run.restore_from with "
        "Run.restore_optimizer = 'drop'."
    )


def is_param(name: str) -> bool:
    """Whether a path is that of a parameter."""
    return name.startswith(PARAMS)


def _params_first(name: str) -> tuple[bool, str]:
    return not is_param(name), name


def tensors(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path, such as `params/encoder/mlp/wi_0/kernel`.

    Dataclasses, named tuples and lists come back from disk as dicts and lists; only the names of
    their entries are compared.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _describe(leaf: Any) -> str:
    shape = "x".join(str(size) for size in getattr(leaf, "shape", ())) or "scalar"
    return f"{shape} {jax.numpy.dtype(leaf.dtype).name}"


def _enumerate(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
