"""The checkpoints of a sweep: found by name, told apart by their content, loaded one by one."""

import dataclasses
import functools
import glob
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from mtl_jax import interop, model, patterns, sharding
from mtl_jax.checkpoint import Checkpointer, locate
from mtl_jax.errors import UserError, suggest
from mtl_jax.evaluate import Engine
from mtl_jax.model_config import T5Config
from mtl_jax.placement import Placement
from mtl_jax.sharing import tree
from mtl_jax.sharing.plan import SharingPlan, from_description

# Fields of T5 that say how a model is computed: Gin's hold. All others are the checkpoint's.
_OF_A_RUN = ("dtype", "logits_dtype", "scan_layers", "attention", "remat", "dropout_rate")
# Of these the numbers depend, so they are part of what a checkpoint is.
_OF_NUMBERS = ("dtype", "logits_dtype")
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 12


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """One model of a sweep.

    Attributes:
      name: unique in the sweep, such as `p3@400`; also the name of a folder.
      run: name of its run or folder.
      step: of training.
      path: of the run or folder; for a run, `step` says which of its checkpoints.
      kind: as `interop.detect` says.
      identity: digest of its content, wherever it lies, and of the precision of the computation.
      config: the model; with a plan, `plan.model_config` is what is run.
      plan: how its tasks share parameters; None: they share all.
      prompt: tokens in front of every input, of a converted checkpoint.
      description: of its sharing, equal for equal plans.
    """

    name: str
    run: str
    step: int
    path: Path
    kind: str
    identity: str
    config: T5Config
    plan: SharingPlan | None
    prompt: tuple[int, ...]
    description: str

    @property
    def model_config(self) -> T5Config:
        """The T5 that is run."""
        return self.config if self.plan is None else self.plan.model_config

    @property
    def run_directory(self) -> Path | None:
        """The run that it is of; None: it is from elsewhere."""
        return self.path if self.kind == "mtl_jax" else None

    @functools.cached_property
    def parameters(self) -> int:
        """How many parameters the T5 has that is run."""
        leaves = jax.tree.leaves(model.abstract_params(self.model_config))
        return sum(int(leaf.size) for leaf in leaves)


def find(given: Sequence[str], fields: Mapping[str, Any]) -> list[Checkpoint]:
    """Opens the checkpoints that a sweep names; reads no parameters.

    Args:
      given: `Sweep.checkpoints`.
      fields: those of T5 that Gin names.

    Returns:
      Each once, in the order given; the steps of a run ascend.

    Raises:
      UserError: nothing there, no such step, a damaged checkpoint, or another model than Gin says.
    """
    places = list(dict.fromkeys(place for text in given for place in _places(text)))
    runs = [_run_name(path) for path, _, _ in places]
    of_name: dict[str, set[Path]] = {}
    for name, (path, _, _) in zip(runs, places, strict=True):
        of_name.setdefault(name, set()).add(path)
    found = []
    for name, (path, kind, step) in zip(runs, places, strict=True):
        if len(of_name[name]) > 1:  # two runs of one name in different folders
            name = f"{_run_name(path.parent)}-{name}"
        found.append(_open(name, path, kind, step, fields))
    names = [checkpoint.name for checkpoint in found]
    for name in names:
        if names.count(name) > 1:
            paths = [str(c.path) for c in found if c.name == name]
            raise UserError(
                f"Sweep.checkpoints: {' and '.join(paths)} would both be called {name!r}; rename "
                "one of the folders."
            )
    return found


def _run_name(path: Path) -> str:
    return re.sub(r"[^\w.+-]", "_", path.name) or "checkpoint"


def _places(text: str) -> Iterator[tuple[Path, str, int | None]]:
    """(path, kind, step) of what one entry of `Sweep.checkpoints` names."""
    pattern, step = text, ""
    if not Path(text).expanduser().exists() and "@" in text:
        pattern, _, step = text.rpartition("@")
        if not re.fullmatch(r"\d+|\*", step):
            raise UserError(
                f"Sweep.checkpoints: {text!r} must end with @STEP or @* (all steps), not @{step}."
            )
    pattern = str(Path(pattern).expanduser())
    paths = [Path(pattern)] if Path(pattern).exists() else sorted(map(Path, glob.glob(pattern)))
    if not paths:
        folder = Path(pattern).parent
        near = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        raise UserError(
            f"Sweep.checkpoints: {text!r}: there is no {pattern}."
            f"{suggest(Path(pattern).name, near)}"
        )
    for path in paths:
        kind = interop.detect(path)
        if kind != "mtl_jax":
            if step:
                raise UserError(f"Sweep.checkpoints: {text!r}: {path} has no steps to choose from.")
            yield path.resolve(), kind, None
            continue
        folder, named = locate(path)
        with Checkpointer(folder, read_only=True) as checkpointer:
            steps = checkpointer.steps()
        if not steps:
            raise UserError(f"Sweep.checkpoints: {folder} holds no complete checkpoint.")
        wanted = {"*": steps, "": [steps[-1] if named is None else named]}.get(step) or [int(step)]
        for number in wanted:
            if number not in steps:
                raise UserError(
                    f"Sweep.checkpoints: {text!r}: {folder} holds no checkpoint of step {number}, "
                    f"but of {', '.join(map(str, steps))}."
                )
            yield folder.resolve().parent, kind, number


def _open(
    run: str, path: Path, kind: str, step: int | None, fields: Mapping[str, Any]
) -> Checkpoint:
    meta: dict[str, Any] = {}
    if kind == "mtl_jax":
        with Checkpointer(path / "checkpoints", read_only=True) as checkpointer:
            meta = checkpointer.meta(step)
        own = _own_config(meta, path)
        content = path / "checkpoints" / str(step)
    else:
        source = interop.open_source(path)
        own, step, content = source.config, source.step, path
    config = _computed(own, fields, f"{path} at step {step}")
    plan = from_description(meta["sharing"], config) if "sharing" in meta else None
    numbers = [getattr(config, field) for field in _OF_NUMBERS]
    digest = hashlib.sha256(json.dumps([_content(content), *numbers]).encode())
    return Checkpoint(
        name=f"{run}@{step}",
        run=run,
        step=step or 0,
        path=path,
        kind=kind,
        identity=digest.hexdigest()[:32],
        config=config,
        plan=None if plan is None or plan.empty else plan,
        prompt=tuple(meta.get("prompt", ())),
        description=json.dumps(meta.get("sharing"), sort_keys=True),
    )


def _own_config(meta: Mapping[str, Any], path: Path) -> T5Config:
    known = {field.name for field in dataclasses.fields(T5Config)}
    values = meta.get("model")
    if not isinstance(values, dict) or values.keys() - known:
        raise UserError(
            f"The checkpoint in {path} does not say what model it is of, or was written by a newer "
            "version of mtl_jax."
        )
    return T5Config(**values)


def _computed(own: T5Config, fields: Mapping[str, Any], place: str) -> T5Config:
    """The checkpoint's model, computed as Gin says."""
    for name, value in fields.items():
        if name not in _OF_A_RUN and getattr(own, name) != value:
            raise UserError(
                f"T5.{name} = {value!r}, but that of the checkpoint {place} is "
                f"{getattr(own, name)!r}. Leave T5 out: each checkpoint brings its own model."
            )
    ours = {name: value for name, value in fields.items() if name in _OF_A_RUN}
    return dataclasses.replace(own, dropout_rate=0.0, remat="none", **ours)


def _content(path: Path) -> list[Any]:
    """What tells files from others without reading all of them: names, sizes, samples."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found = []
    for file in files:
        size = file.stat().st_size
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            if size <= _SAMPLES * _SAMPLE_BYTES:
                digest.update(opened.read())
            else:
                for i in range(_SAMPLES):
                    opened.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                    digest.update(opened.read(_SAMPLE_BYTES))
        found.append([file.relative_to(path).as_posix(), size, digest.hexdigest()])
    return found


class Models:
    """Loads checkpoints onto the devices; equal models share their compiled functions."""

    def __init__(self, mesh: jax.sharding.Mesh, placement: Placement):
        """Nothing is loaded yet.

        Args:
          mesh: where parameters live.
          placement: how batches join them.
        """
        self._mesh, self._placement = mesh, placement
        self._engines: dict[tuple[T5Config, str], Engine] = {}

    def engine(self, checkpoint: Checkpoint) -> Engine:
        """What asks a checkpoint's model; the same for all checkpoints of one model."""
        key = checkpoint.config, checkpoint.description
        if key not in self._engines:
            self._engines[key] = Engine(checkpoint.model_config, self._placement, checkpoint.plan)
        return self._engines[key]

    def load(self, checkpoint: Checkpoint) -> model.Params:
        """The parameters, of the model or of the plan, on the devices.

        Raises:
          UserError: a damaged checkpoint, or a mesh that does not fit the model.
        """
        sharding.validate(self._mesh, checkpoint.config, self._placement.row_multiple)
        if checkpoint.plan is None:
            shapes = model.abstract_params(checkpoint.config)
            axes = model.param_axes(checkpoint.config)
        else:
            plan = checkpoint.plan
            shapes = jax.eval_shape(
                lambda rng: tree.init(plan, rng, model.init(plan.base, rng)), jax.random.key(0)
            )
            axes = tree.axes(plan)
        places = patterns.by_path(sharding.params_shardings(self._mesh, axes))
        abstract = patterns.as_tree(
            {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path])
                for path, leaf in patterns.by_path(shapes).items()
            }
        )
        if checkpoint.kind != "mtl_jax":
            return interop.load_params(interop.open_source(checkpoint.path), abstract)
        with Checkpointer(checkpoint.path / "checkpoints", read_only=True) as checkpointer:
            return checkpointer.restore_parameters(checkpoint.step, abstract)[0]
