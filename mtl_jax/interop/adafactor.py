"""The state of T5X's Adafactor as that of ours: the same numbers in another layout.

Both keep for a matrix of squared gradients its means over rows and over columns, and the whole for
all else; with momentum also the mean of past steps. They differ in what lies where.

T5X: `v_row` and `v_col` or `v`, and `m`; what a parameter does not have is `zeros(1)`. A parameter
of one or two axes is treated as in optax: it is factored where both sides have a least size, and
`v_row` belongs to the smaller side. With more axes, or layers among them, names decide
(`standard_logical_factor_rules`): a matrix is factored whatever its size, `v_row` belongs to the
axis `embed`, and norms and position biases are not factored.

Ours: a layer at a time, as optax. So the two change places where `embed` is the larger side, or
the second of equal ones: that alters no update, because V = R C / mean(R) and mean(R) = mean(C).

Source: google-research/t5x, `t5x/adafactor.py`.
"""

import functools
from typing import Any

import jax
import numpy as np

from mtl_jax import model, optim
from mtl_jax.errors import UserError
from mtl_jax.interop.native import KeptOptimizer, Streamed, whole_number
from mtl_jax.interop.source import TensorPath, pieces, written
from mtl_jax.interop.t5x import OUT, T5xSource

MOMENTS = ("v_row", "v_col", "v", "m")
NONE = (1,)  # the shape of a moment that a parameter does not have
_SECOND_IS_EMBED = (OUT, "wo")
_ADVICE = "Use --optimizer drop to convert the parameters alone."
_DEFAULT_LEAST = optim.OptimizerConfig.min_dim_size_to_factor


def kept_optimizer(source: T5xSource) -> KeptOptimizer:
    """The optimizer's state of a T5X checkpoint, to be written tensor by tensor.

    Args:
      source: the checkpoint.

    Raises:
      UserError: it holds no state, that of another optimizer, or one that ours cannot have; the
        tensor and both shapes are named.
    """
    moments = _Moments(source)
    cfg = optim.OptimizerConfig(
        min_dim_size_to_factor=moments.least,
        # Any value: it does not show in a state.
        momentum=0.5 if moments.momentum else 0.0,
    )
    shapes = jax.eval_shape(optim.make_optimizer(cfg).init, model.abstract_params(source.config))
    state = jax.tree_util.tree_map_with_path(moments.streamed, shapes)
    return KeptOptimizer(source.step, cfg.name, moments.least, moments.momentum, state)


def has_state(source: T5xSource) -> bool:
    """Whether the checkpoint holds the state of any optimizer."""
    return bool(_param_states(source))


def _param_states(source: T5xSource) -> Any:
    state = source.tree.get("state")
    return state.get("param_states") if isinstance(state, dict) else None


class _Moments:
    """The arrays of T5X's Adafactor.

    Attributes:
      least: a `min_dim_size_to_factor` by which ours factors what T5X did.
      momentum: whether there is any.
    """

    def __init__(self, source: T5xSource):
        self._source = source
        states = _param_states(source)
        if not isinstance(states, dict) or not states:
            raise UserError(f"{source.file} holds parameters but no optimizer state. {_ADVICE}")
        names = [source.name(path, layer) for path, layer, _ in pieces(source.config)]
        try:
            self._arrays = source.opened(states)
        except UserError as error:
            raise UserError(f"State of the optimizer: {error} {_ADVICE}") from error
        wanted = {f"{name}/{moment}": name for name in names for moment in MOMENTS}
        for name in wanted:
            if name not in self._arrays:
                raise UserError(
                    f"{source.file}: the optimizer's state lacks {name}. What can be kept is that "
                    "of T5X's Adafactor, of all parameters: not another optimizer's, or one with "
                    f"parameters left out. {_ADVICE}"
                )
        if unknown := sorted(self._arrays.keys() - wanted.keys()):
            raise UserError(
                f"{source.file}: the optimizer's state has {unknown[0]} "
                f"({written(self._arrays[unknown[0]].shape)}), which that of T5X's Adafactor has "
                f"not. {_ADVICE}"
            )
        self.momentum = any(self._arrays[f"{name}/m"].shape != NONE for name in names)
        self.least = self._check()

    def _check(self) -> int:
        """Compares all shapes; returns the least side of a factored matrix."""
        # Of the matrices that T5X factored the one of the least side; of the others the largest.
        factored: tuple[int, str] | None = None
        whole = (0, "")
        for path, layer, shape in pieces(self._source.config):
            name = self._source.name(path, layer)
            is_factored = self._check_tensor(path, name, shape)
            side = (min(shape) if len(shape) == 2 else 0, f"{name} ({written(shape)})")
            if is_factored:
                factored = min(factored or side, side)
            else:
                whole = max(whole, side)
        if factored is None:
            return max(_DEFAULT_LEAST, whole[0] + 1)
        if whole[0] >= factored[0]:
            raise UserError(
                f"{self._source.file}: T5X's Adafactor factored {factored[1]}, but not {whole[1]}; "
                "ours factors all matrices whose sides are at least "
                f"Optimizer.min_dim_size_to_factor. {_ADVICE}"
            )
        return min(max(_DEFAULT_LEAST, whole[0] + 1), factored[0])

    def _check_tensor(self, path: TensorPath, name: str, shape: tuple[int, ...]) -> bool:
        """Refuses other shapes than T5X's; returns whether the tensor is factored."""
        there = self._source.layout(path).shape
        found = {moment: self._arrays[f"{name}/{moment}"].shape for moment in MOMENTS}
        is_matrix = len(shape) == 2 and not (self._by_name(path) and path[-1] == "rel_embedding")
        factored = is_matrix and found["v"] == NONE != there
        wanted = {"v": NONE if factored else there, "v_row": NONE, "v_col": NONE}
        if factored:
            row = self._row(path, shape)
            wanted["v_row"] = self._factor_shape(path, row)
            wanted["v_col"] = self._factor_shape(path, 1 - row)
        wanted["m"] = there if self.momentum else NONE
        for moment, sizes in wanted.items():
            if found[moment] != sizes:
                raise UserError(
                    f"{self._source.file}: the optimizer's state {name}/{moment} is "
                    f"{written(found[moment])}, but by T5X's Adafactor it is {written(sizes)} for "
                    f"{name} ({written(there)}). Other rules of factoring cannot be kept. {_ADVICE}"
                )
        return factored

    def _by_name(self, path: TensorPath) -> bool:
        """Whether T5X goes by the names of axes, instead of sizes."""
        layout = self._source.layout(path)
        return layout.layers is not None or len(layout.shape) > 2

    def _row(self, path: TensorPath, shape: tuple[int, ...]) -> int:
        """To which axis of our matrix T5X's `v_row` belongs."""
        if self._by_name(path):
            return int(path[-2] in _SECOND_IS_EMBED)
        return int(np.argsort(shape)[0])

    def _factor_axes(self, path: TensorPath, axis: int) -> list[int]:
        """The axes of T5X's tensor that its factor for an axis of our matrix has."""
        layout = self._source.layout(path)
        left = {*layout.groups[axis], layout.layers}
        return [number for number in range(len(layout.shape)) if number in left]

    def _factor_shape(self, path: TensorPath, axis: int) -> tuple[int, ...]:
        there = self._source.layout(path).shape
        return tuple(there[number] for number in self._factor_axes(path, axis))

    def streamed(self, keys: Any, leaf: jax.ShapeDtypeStruct) -> Streamed:
        """A leaf of the state of our optimizer."""
        _, moment, *path = jax.tree_util.keystr(keys, simple=True, separator="/").split("/")
        if not path:
            return whole_number(self._source.step)
        if leaf.shape == NONE:
            return Streamed(NONE, False, lambda layer: np.zeros(NONE, np.float32))
        read = functools.partial(self.read, moment, tuple(path))
        return Streamed(leaf.shape, "layers" in path, read)

    def read(self, moment: str, path: TensorPath, layer: int | None) -> np.ndarray:
        """A moment of one of our parameters, of one layer, as float32.

        Args:
          moment: field of `optim.AdafactorState`, or "ema", the momentum.
          path: of the parameter.
          layer: None for those that are not in layers.
        """
        name, layout = self._source.name(path, layer), self._source.layout(path)
        if moment in ("v", "ema"):
            theirs = "m" if moment == "ema" else moment
            return self._source.read_as(path, layer, self._arrays[f"{name}/{theirs}"])
        shape = self._source.layer_shape(path)
        factored = optim.factored_axes(shape, 0, self.least)
        assert factored is not None  # all shapes have been compared
        axis = factored[moment == "v_col"]
        theirs = "v_row" if axis == self._row(path, shape) else "v_col"
        x = self._arrays[f"{name}/{theirs}"].read()
        if layout.layers is not None:
            x = x.take(layer, self._factor_axes(path, axis).index(layout.layers))
        return x.reshape(-1)
