"""What training and evaluation share: mesh, tasks, model, state and evaluator, built once."""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import seqio
from jax.sharding import Mesh

from mtl_jax import attention, data, model, optim, sharding, step
from mtl_jax.checkpoint import Checkpointer
from mtl_jax.errors import UserError
from mtl_jax.evaluate import EvalTask, Evaluator, Placement
from mtl_jax.run_directory import RunDirectory, enable_compile_cache

if TYPE_CHECKING:
    from mtl_jax.config import Config


# Fields of T5 that change what is computed, shapes alike or not.
MODEL_FIELDS = (
    *("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim", "mlp_activations"),
    *("num_encoder_layers", "num_decoder_layers", "logits_via_embedding"),
    *("relpos_buckets", "relpos_max_distance"),
)


@dataclasses.dataclass
class Session:
    """A configuration made concrete.

    Attributes:
      config: all values.
      run: the run directory, not yet created.
      mesh: over all devices.
      axes: logical axis names of the parameters.
      abstract_state: the train state as shapes with shardings.
      placement: how evaluation puts its batches on the mesh.
    """

    config: "Config"
    run: RunDirectory
    mesh: jax.sharding.Mesh
    axes: Any
    abstract_state: step.TrainState
    placement: Placement

    @property
    def shardings(self) -> Any:
        """The sharding of every leaf of the train state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    @property
    def attention(self) -> str:
        """Which implementation of attention the train step runs; the encoder's first."""
        return _attention(self.config, self.mesh)

    @property
    def num_parameters(self) -> int:
        """Parameters of the model."""
        return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(self.abstract_state.params))

    def meta(self, task_ids: dict[str, int]) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        return {"model": dataclasses.asdict(self.config.model), "task_ids": task_ids}

    def fresh_state(self) -> step.TrainState:
        """A new train state, made in place on the mesh."""
        optimizer = optim.make_optimizer(self.config.optimizer)
        make = functools.partial(step.init_state, self.config.model, optimizer)
        with sharding.on_mesh(self.mesh):
            return jax.jit(make, out_shardings=self.shardings)(jax.random.key(self.config.run.seed))

    def check_model(self, meta: dict[str, Any], place: str | Path) -> None:
        """Refuses a checkpoint of a model that computes something else with the same shapes.

        Raises:
          UserError: names the field of T5 and both values.
        """
        saved = meta.get("model", {})
        ours = json.loads(json.dumps(dataclasses.asdict(self.config.model)))
        for field in MODEL_FIELDS:
            if field in saved and saved[field] != ours[field]:
                raise UserError(
                    f"The checkpoint {place} is of another architecture: its T5.{field} is "
                    f"{saved[field]!r}, this run's is {ours[field]!r}."
                )

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """One global batch of the training stream as shapes with shardings."""
        cfg, place = self.config.data, sharding.batch_sharding(self.mesh)

        def side(length: int, types: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
            shape = (cfg.batch_size, length)
            return {
                name: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
                for name, dtype in types.items()
            }

        encoder = ("encoder_input_tokens", "encoder_segment_ids", "encoder_task_ids")
        decoder = [f"decoder_{n}" for n in ("input_tokens", "target_tokens", "segment_ids")]
        decoder_types: dict[str, Any] = dict.fromkeys([*decoder, "decoder_task_ids"], np.int32)
        decoder_types["decoder_loss_weights"] = np.float32
        inputs = side(cfg.inputs_length, dict.fromkeys(encoder, np.int32))
        return inputs | side(cfg.targets_length, decoder_types)

    def evaluator(self) -> Evaluator:
        """The evaluator of this session; keep it, it holds the compiled functions."""
        return Evaluator(self.config.model, self.placement, self.config.eval)

    def eval_tasks(self) -> list[EvalTask]:
        """The tasks of `Eval.tasks` with their examples."""
        cfg = self.config.eval
        return [
            data.load_eval_task(
                name, cfg.split, cfg.inputs_length, cfg.targets_length, cfg.limit, cfg.seed
            )
            for name in _eval_names(self.config)
        ]


def _attention(config: "Config", mesh: Mesh) -> str:
    inputs, targets = config.data.inputs_length, config.data.targets_length
    pairs = ((inputs, inputs), (targets, targets), (targets, inputs))
    with attention.platform(mesh.devices.flat[0].platform):
        chosen = [attention.chosen(config.model.attention, *lengths) for lengths in pairs]
    return ", ".join(dict.fromkeys(chosen))


def build(config: "Config") -> Session:
    """Everything but arrays and files: cheap, and every mistake in the values shows here.

    Raises:
      UserError: a value that does not fit; nothing has been written yet.
    """
    if not config.run.directory:
        raise UserError("Run.directory is empty: say where the run's files go.")
    if jax.process_count() > 1:
        raise UserError("A run of several processes is not supported yet: start one process.")
    sharding.configure_jax()
    enable_compile_cache(config.run.directory, enabled=config.run.compile_cache)
    mesh = sharding.make_mesh(config.mesh)
    sharding.validate(mesh, config.model, config.data.batch_size, config.step.microbatches)
    _attention(config, mesh)  # an error where T5.attention asks for a kernel that is not there
    data.load_modules(config.data)
    made = data.build_mixture(config.mixture) if config.mixture.name else ""
    mixture = config.data.mixture or made
    if made and mixture != made:
        raise UserError(
            f"Mixture.name = {made!r} makes a mixture that is not trained on, because Data.mixture "
            f"= {mixture!r}: set Data.mixture to {made!r} or drop one of the two."
        )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, mixture=mixture))
    _check_vocabulary(config, data.task_names(mixture) if mixture else [])
    _check_evaluation(config)

    axes = model.param_axes(config.model)
    make = functools.partial(step.init_state, config.model, optim.make_optimizer(config.optimizer))
    shapes = jax.eval_shape(make, jax.random.key(0))
    abstract_state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        sharding.state_shardings(mesh, axes, shapes),
    )
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    placement = Placement(
        put=lambda arrays: jax.device_put(
            arrays, jax.tree.map(lambda x: rows if np.ndim(x) else everywhere, arrays)
        ),
        replicated=everywhere,
        row_multiple=mesh.shape["data"] * mesh.shape["fsdp"],
        context=lambda: sharding.on_mesh(mesh),
    )
    run = RunDirectory(config.run.directory, primary=jax.process_index() == 0)
    return Session(config, run, mesh, axes, abstract_state, placement)


def _eval_names(config: "Config") -> list[str]:
    names = [name for given in data.expand(config.eval.tasks) for name in data.task_names(given)]
    return list(dict.fromkeys(names))


def _check_evaluation(config: "Config") -> None:
    names = _eval_names(config)
    _check_vocabulary(config, names)
    for name in names:
        data.check_split(seqio.TaskRegistry.get(name), config.eval.split)
    if config.checkpoint.best_metric and not names:
        raise UserError(
            f"Checkpoint.best_metric = {config.checkpoint.best_metric!r} needs an evaluation: set "
            "Eval.tasks and Eval.every."
        )


def _check_vocabulary(config: "Config", names: list[str]) -> None:
    if not names:
        return
    size = data.vocabulary_size(names)
    if size > config.model.vocab_size:
        raise UserError(
            f"The tasks' vocabulary has {size} ids but T5.vocab_size = {config.model.vocab_size}: "
            f"set T5.vocab_size to at least {size} (a multiple of 128 shards well)."
        )


def open_checkpoint(path: str) -> tuple[Checkpointer, int | None]:
    """A checkpointer to read from `path`, and the step that the path names, if it does.

    Args:
      path: a run directory, its `checkpoints` folder, or one step in it.

    Raises:
      UserError: there is no checkpoint at that path.
    """
    folder, number = Path(path).expanduser(), None
    if re.fullmatch(r"\d+", folder.name) and folder.parent.name == "checkpoints":
        folder, number = folder.parent, int(folder.name)
    elif (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    checkpointer = Checkpointer(folder, read_only=True)
    if checkpointer.latest() is None:
        raise UserError(f"No checkpoint in {folder}: name a run directory or a step in it.")
    return checkpointer, number


def start_state(session: Session) -> step.TrainState:
    """Fresh parameters, or those of `Run.restore_from`."""
    cfg = session.config.run
    if not cfg.restore_from:
        return session.fresh_state()
    if cfg.restore_optimizer == "keep":
        checkpointer, number = open_checkpoint(cfg.restore_from)
        with checkpointer:
            session.check_model(checkpointer.meta(number), cfg.restore_from)
            return checkpointer.restore(number, session.abstract_state)[0]
    params, _ = load_params(session, cfg.restore_from)
    return dataclasses.replace(session.fresh_state(), params=params)


def load_params(session: Session, path: str) -> tuple[model.Params, int]:
    """The parameters of a checkpoint and its step.

    Args:
      session: says what model, and where its parameters live.
      path: see `open_checkpoint`.

    Raises:
      UserError: no checkpoint there, or one of another model.
    """
    checkpointer, number = open_checkpoint(path)
    with checkpointer:
        number = checkpointer.latest() if number is None else number
        session.check_model(checkpointer.meta(number), path)
        params, _ = checkpointer.restore_parameters(number, session.abstract_state.params)
    return params, number or 0


def mixture_text(session: Session) -> str:
    """The training mixture as a table: task, examples, rate and share of the examples drawn."""
    cfg = session.config.data
    rows = data.mixture_table(cfg.mixture, cfg.split)
    width = max(len(row.task) for row in rows)
    lines = [f"{'task':<{width}}  {'examples':>10}  {'rate':>12}  {'share':>7}"]
    for row in rows:
        examples = "unknown" if row.examples is None else f"{row.examples:,}"
        lines.append(f"{row.task:<{width}}  {examples:>10}  {row.rate:>12,.2f}  {row.share:>7.2%}")
    return "\n".join(lines) + "\n"
