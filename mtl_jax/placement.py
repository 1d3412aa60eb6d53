"""How batches get to the devices and results come back, one batch behind."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from mtl_jax import sharding

_Batch = TypeVar("_Batch")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where parameters are sharded, this is how batches join them.

    Attributes:
      put: from a tree of numpy arrays [rows, ...], the same in every process, to device arrays.
      replicated: sharding of the results, such that each process can read them; None: leave it.
      row_multiple: batches have a multiple of so many rows.
      context: entered around each call of the model (mesh, axis rules).
    """

    put: Callable[[Any], Any] = jax.device_put
    replicated: Any = None
    row_multiple: int = 1
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def replicate(self, tree: Any) -> Any:
        """Inside of a compiled function: results that every process can read."""
        if self.replicated is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.replicated)

    def pipelined(
        self, batches: Iterable[_Batch], dispatch: Callable[[_Batch], Any]
    ) -> Iterator[tuple[_Batch, Any]]:
        """Yields each batch with its result as numpy, one batch behind the device."""
        waiting = None
        for batch in batches:
            with self.context():
                result = dispatch(batch)
            if waiting is not None:
                yield waiting[0], jax.device_get(waiting[1])
            waiting = batch, result
        if waiting is not None:
            yield waiting[0], jax.device_get(waiting[1])


def on_mesh(mesh: Mesh) -> Placement:
    """Rows over the axes `data` and `fsdp` of a mesh."""
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    return Placement(
        put=lambda arrays: jax.tree.map(
            lambda x: sharding.put_whole(rows if np.ndim(x) else everywhere, np.asarray(x)), arrays
        ),
        replicated=everywhere,
        row_multiple=mesh.shape["data"] * mesh.shape["fsdp"],
        context=lambda: sharding.on_mesh(mesh),
    )
