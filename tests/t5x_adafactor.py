"""T5X's Adafactor written anew in float64, and its state as T5X lays it out; a witness.

After Shazeer and Stern 2018 and the documented rules of T5X (`standard_logical_factor_rules`): a
loop over layers, each a matrix whose rows are the axis `embed` and whose columns are all others.
"""

import dataclasses

import numpy as np

# Logical axes of T5X's parameters, one layer of them; by the last two parts of a name.
AXES = {
    "token_embedder/embedding": ("vocab", "embed"),
    "logits_dense/kernel": ("embed", "vocab"),
    "relpos_bias/rel_embedding": ("heads", "relpos_buckets"),
    "out/kernel": ("joined_kv", "embed"),
    "wo/kernel": ("mlp", "embed"),
    **dict.fromkeys(("wi/kernel", "wi_0/kernel", "wi_1/kernel"), ("embed", "mlp")),
    **dict.fromkeys(("query/kernel", "key/kernel", "value/kernel"), ("embed", "joined_kv")),
}


def axes(name, ndim):
    """The logical axes of a parameter of T5X; layers are along the second axis."""
    found = AXES.get("/".join(name.split("/")[-2:]), ("embed",))
    stack = name.split("/")[0]
    stacked = name.startswith(f"{stack}/{stack}/")
    if ndim - stacked > len(found):  # of attention, with heads apart
        found = tuple(a for x in found for a in (("heads", "kv") if x == "joined_kv" else (x,)))
    return (found[0], "layers", *found[1:]) if stacked else found


@dataclasses.dataclass
class Parameter:
    """One parameter with its state: `x` as T5X has it, moments layer by layer."""

    name: str
    x: np.ndarray
    min_dim: int
    beta1: float | None = None
    factored: bool = True
    layers: list = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.x = self.x.astype(np.float64)
        self.axes = axes(self.name, self.x.ndim)
        self.layers = [{} for _ in self.each(self.x)]

    @property
    def where(self):
        return self.axes.index("layers") if "layers" in self.axes else None

    def each(self, x):
        """The layers of an array that lies as the parameter."""
        return [x] if self.where is None else list(np.moveaxis(x, self.where, 0))

    @property
    def rows(self):
        """The axes of a layer that are rows, the others being columns; None: not factored."""
        names = [axis for axis in self.axes if axis != "layers"]
        sizes = self.each(self.x)[0].shape
        if not self.factored or len(names) < 2:
            return None
        if self.where is None and len(names) == 2:
            smaller = 0 if sizes[0] <= sizes[1] else 1
            return [smaller] if min(sizes) >= self.min_dim else None
        return [names.index("embed")] if "embed" in names else None

    def update(self, step, rate, grad, decay_rate=0.8):
        """One step of descent; `step` counts from 0."""
        beta2 = 1.0 - (step + 1.0) ** -decay_rate
        made = [
            self._layer(x, g, state, rate, beta2)
            for x, g, state in zip(
                self.each(self.x), self.each(grad.astype(np.float64)), self.layers, strict=True
            )
        ]
        self.x = made[0] if self.where is None else np.stack(made, self.where)

    def _layer(self, x, g, state, rate, beta2):
        def moved(name, new):
            state[name] = beta2 * state.get(name, 0.0) + (1.0 - beta2) * new
            return state[name]

        square = g**2 + 1e-30
        if self.rows is None:
            v = moved("v", square)
        else:
            columns = [axis for axis in range(x.ndim) if axis not in self.rows]
            r = moved("v_row", square.mean(tuple(columns), keepdims=True))
            c = moved("v_col", square.mean(tuple(self.rows), keepdims=True))
            v = r * c / r.mean()
        u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt(np.mean(u**2)))
        change = rate * max(1e-3, np.sqrt(np.mean(x**2))) * u
        if self.beta1 is not None:
            state["m"] = self.beta1 * state.get("m", 0.0) + (1.0 - self.beta1) * change
            change = state["m"]
        return x - change

    def stored(self):
        """The state as T5X stores it, float32."""
        return {name: self._stored(name) for name in ("v_row", "v_col", "v", "m")}

    def _stored(self, name):
        if name not in self.layers[0]:
            return np.zeros(1, np.float32)
        parts = [state[name] for state in self.layers]
        if self.where is None:
            whole, gone = parts[0], [axis for axis, size in enumerate(parts[0].shape) if size == 1]
        else:
            whole = np.stack(parts, self.where)
            gone = [n for n, size in enumerate(whole.shape) if size == 1 and n != self.where]
        if name in ("v_row", "v_col"):
            whole = whole.squeeze(tuple(gone))
        return whole.astype(np.float32)


def rate(step, constant=0.5, warmup=4):
    """'constant * linear_warmup * rsqrt_decay'."""
    return constant * min(1.0, step / warmup) / np.sqrt(max(step, warmup))


def gradients(parameters, seed):
    """Random ones, float32, whose rows and columns differ in size."""
    rng = np.random.RandomState(seed)
    made = {}
    for name, one in sorted(parameters.items()):
        g = rng.randn(*one.x.shape)
        for axis, size in enumerate(one.x.shape):
            along = [size if n == axis else 1 for n in range(one.x.ndim)]
            g = g * np.exp(rng.randn(size)).reshape(along)
        made[name] = g.astype(np.float32)
    return made
