"""What training and evaluation share: mesh, tasks, model, state and evaluator, built once."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import seqio
from jax.sharding import Mesh

from mtl_jax import (
    attention,
    data,
    effective_mixture,
    microbatches,
    model,
    optim,
    patterns,
    placement,
    processes,
    restore,
    sharding,
    step,
    tokenizer,
    vocabulary,
)
from mtl_jax.balance.balancer import Balancer, describe_cost, make_balancer
from mtl_jax.checkpoint import Checkpointer, locate
from mtl_jax.effective_mixture import EffectiveMixture
from mtl_jax.errors import UserError
from mtl_jax.evaluate import EvalTask, Evaluator
from mtl_jax.run_directory import RunDirectory, enable_compile_cache
from mtl_jax.sharing import embeddings, tree
from mtl_jax.sharing.plan import SharingPlan, make_plan
from mtl_jax.sharing.sharing_config import rooms_of

if TYPE_CHECKING:
    from mtl_jax.config import Config


# Fields of T5 that change what is computed, shapes alike or not.
MODEL_FIELDS = (
    *("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim", "mlp_activations"),
    *("num_encoder_layers", "num_decoder_layers", "logits_via_embedding"),
    *("relpos_buckets", "relpos_max_distance", "relpos_per_layer", "rescale_logits"),
    "adapter_dim",
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
      balancer: how the tasks share the update.
      placement: how evaluation puts its batches on the mesh.
      sharing: how the tasks share parameters.
    """

    config: "Config"
    run: RunDirectory
    mesh: jax.sharding.Mesh
    axes: Any
    abstract_state: step.TrainState
    balancer: Balancer
    placement: placement.Placement
    sharing: SharingPlan

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

    @property
    def balance_cost(self) -> str:
        """What sharing the update costs, in words."""
        trained = optim.split(self.config.optimizer, self.abstract_state.params)[0]
        return describe_cost(self.balancer, sharding.bytes_per_device(trained))

    def examples(self) -> dict[str, int | None]:
        """Examples of each task of the mixture, None where the source does not know."""
        table = data.mixture_table(self.config.data.mixture, self.config.data.split)
        return {row.task: row.examples for row in table}

    def method_info(self) -> dict[str, Any]:
        """The method that shares the update and the values of its fields, for JSON."""
        method = self.config.method
        options = {} if method is None else dataclasses.asdict(method)  # type: ignore[call-overload]
        return {"method": self.config.balance.method, "options": options}

    def rates(self, state: step.TrainState) -> dict[str, float]:
        """The rates that the method's state suggests for the tasks of the mixture; empty: none.

        Those of an owner of several tasks (`Balance.by`) are divided as the mixture divides them.
        """
        method = self.balancer.method
        if method is None or not hasattr(method, "rates"):
            return {}
        # The state is whole on every device.
        found = method.rates(jax.device_get(state.balance.method), self.balancer.names) or {}
        base = data.rates_of(self.config.data.mixture)
        owners = {task: microbatches.owner(task, self.config.balance.by) for task in base}
        total = dict.fromkeys(owners.values(), 0.0)
        for task, rate in base.items():
            total[owners[task]] += rate
        return {
            task: found[owners[task]] * rate / total[owners[task]]
            for task, rate in base.items()
            if rate and owners[task] in found
        }

    def block_of(self, task: str) -> str:
        """What a block of rows is of, where blocks are; tasks of the same may share one."""
        return microbatches.block_of(task, self.config, self.balancer, self.sharing)

    def meta(self, task_ids: dict[str, int], origin: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint says of itself; `origin` is what it was converted from, if anything."""
        model_fields = dataclasses.asdict(self.config.model)
        meta: dict[str, Any] = {"model": model_fields, "task_ids": task_ids}
        if not self.sharing.empty:
            meta["sharing"] = self.sharing.describe()
        return meta | ({"source": origin} if origin else {})

    def origin(self, own: Checkpointer) -> dict[str, Any]:
        """What the run's weights were converted from, as its newest checkpoint says.

        Or, for a run that has none yet, the checkpoint that it starts from.
        """
        newest = processes.from_primary(own.latest())
        if newest is not None:
            return own.meta(newest).get("source", {})
        if not self.config.run.restore_from:
            return {}
        checkpointer, number = open_checkpoint(self.config.run.restore_from)
        with checkpointer:
            return checkpointer.meta(number).get("source", {})

    def fresh_state(self, given: Mapping[str, jax.Array] | None = None) -> step.TrainState:
        """A new train state, made in place on the mesh.

        Args:
          given: parameters that are there already, by path; the others are made.
        """
        given = given or {}

        def others(state: step.TrainState) -> step.TrainState:
            leaves = patterns.by_path(state.params).items()
            return dataclasses.replace(
                state, params={path: leaf for path, leaf in leaves if path not in given}
            )

        optimizer = optim.make_optimizer(self.config.optimizer)

        def make(rng: jax.Array) -> step.TrainState:
            made = step.init_state(self.config.model, optimizer, rng, self.balancer, self.sharing)
            return others(made)

        with sharding.on_mesh(self.mesh):
            jitted = jax.jit(make, out_shardings=others(self.shardings))
            state = jitted(jax.random.key(self.config.run.seed))
        return dataclasses.replace(state, params=patterns.as_tree(state.params | given))

    def shared_state(self, given: Mapping[str, jax.Array]) -> step.TrainState:
        """As `fresh_state`, where `given` are of the plain T5 that sharing starts from."""
        optimizer = optim.make_optimizer(self.config.optimizer)

        def make(rng: jax.Array, given: Mapping[str, jax.Array]) -> step.TrainState:
            return step.init_state(
                self.config.model, optimizer, rng, self.balancer, self.sharing, given
            )

        with sharding.on_mesh(self.mesh):
            jitted = jax.jit(make, out_shardings=self.shardings)
            return jitted(jax.random.key(self.config.run.seed), given)

    @property
    def abstract_plain(self) -> model.Params:
        """The parameters of the plain T5 that sharing starts from, as shapes with shardings."""
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            model.abstract_params(self.config.model),
            sharding.params_shardings(self.mesh, model.param_axes(self.config.model)),
        )

    def check_model(self, meta: dict[str, Any], place: str | Path, *, plain: bool = False) -> None:
        """Refuses a checkpoint of a model that computes something else with the same shapes.

        Args:
          meta: of the checkpoint.
          place: of the checkpoint, for messages.
          plain: it is of the plain T5 that sharing starts from.

        Raises:
          UserError: names the field of T5 and both values.
        """
        for difference in self.model_differences(meta):
            raise UserError(f"The checkpoint {place} is of another architecture: its {difference}.")
        if meta.get("prompt"):
            raise UserError(
                f"The checkpoint {place} wants {len(meta['prompt'])} prompt tokens in front of "
                "every input, which only `mtl-jax infer` and mtl_jax.load put there: use these, or "
                "the run that it was converted from."
            )
        if not plain:
            self.sharing.check_description(meta.get("sharing"), place)

    def model_differences(self, meta: dict[str, Any]) -> list[str]:
        """What a checkpoint's meta says of its model that is not so in this run."""
        saved = meta.get("model", {})
        if saved:  # older ones lack fields that came later
            tied = saved.get("logits_via_embedding", False)
            earlier = {"relpos_per_layer": False, "rescale_logits": tied, "adapter_dim": 0}
            saved = earlier | saved
        ours = json.loads(json.dumps(dataclasses.asdict(self.config.model)))
        return [
            f"T5.{field} is {saved[field]!r}, this run's is {ours[field]!r}"
            for field in MODEL_FIELDS
            if field in saved and saved[field] != ours[field]
        ]

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
        model_config = self.sharing.model_config
        return Evaluator(model_config, self.placement, self.config.eval, self.sharing)

    def eval_tasks(self) -> list[EvalTask]:
        """The tasks of `Eval.tasks` with their examples."""
        cfg = self.config.eval
        how = cfg.split, cfg.inputs_length, cfg.targets_length, cfg.limit, cfg.seed
        return [
            data.load_eval_task(name, *how, use_cached=cfg.use_cached)
            for name in _eval_names(self.config)
        ]


def _attention(config: "Config", mesh: Mesh) -> str:
    inputs, targets = config.data.inputs_length, config.data.targets_length
    pairs = ((inputs, inputs), (targets, targets), (targets, inputs))
    with attention.platform(mesh.devices.flat[0].platform):
        chosen = [attention.chosen(config.model.attention, *lengths) for lengths in pairs]
    return ", ".join(dict.fromkeys(chosen))


def build(
    config: "Config", *, training: bool = True, devices: Sequence[Any] | None = None
) -> Session:
    """Everything but arrays and files: cheap, and every mistake in the values shows here.

    Args:
      config: all values.
      training: whether the session will train; how a batch is divided concerns nobody else.
      devices: of the mesh, those of `targets.devices` included; None: all there are.

    Raises:
      UserError: a value that does not fit; nothing has been written yet.
    """
    if not config.run.directory:
        raise UserError("Run.directory is empty: say where the run's files go.")
    sharding.configure_jax()
    enable_compile_cache(config.run.directory, enabled=config.run.compile_cache)
    mesh = sharding.make_mesh(config.mesh, devices)
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

    run = RunDirectory(config.run.directory, primary=processes.primary())
    task_ids = run.task_ids(data.task_names(mixture) if mixture else [])
    owners = [
        microbatches.owner(name, config.balance.by)
        for name in sorted(task_ids, key=task_ids.__getitem__)
    ]
    plan = _sharing_plan(config, sorted(task_ids, key=task_ids.__getitem__), mixture)
    axes = tree.axes(plan)
    # A bank's axis is on no mesh axis, and an axis of tasks comes before it.
    of_slots = {
        path: tuple(None if axis == "tasks" else axis for axis in names)
        for path, names in patterns.by_path(axes).items()
    }
    balancer = make_balancer(config.balance, config.method, owners, config.model, of_slots)
    microbatches.check_sharing(config, balancer, plan)
    config = microbatches.with_blocks(config, mesh, balancer, plan) if training else config
    make = functools.partial(
        step.init_state,
        config.model,
        optim.make_optimizer(config.optimizer),
        balancer=balancer,
        plan=plan,
    )
    shapes = jax.eval_shape(make, jax.random.key(0))
    optim.check_groups(config.optimizer, shapes.params)
    # With sharing, what is restored may also be a plain T5.
    known = patterns.by_path(model.abstract_params(config.model)) | patterns.by_path(shapes.params)
    restore.plan(config.run.restore_map, known)
    abstract_state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        sharding.state_shardings(mesh, axes, shapes),
    )
    return Session(config, run, mesh, axes, abstract_state, balancer, placement.on_mesh(mesh), plan)


def _sharing_plan(config: "Config", names: list[str], mixture: str) -> SharingPlan:
    plan = make_plan(rooms_of(config), names, config.model)
    for read in (data.task_names(mixture) if mixture else [], _eval_names(config)):
        if read:
            embeddings.check_vocabulary(plan, int(data.vocabulary(read).vocab_size))
    return plan


def _eval_names(config: "Config") -> list[str]:
    names = [name for given in data.expand(config.eval.tasks) for name in data.task_names(given)]
    return list(dict.fromkeys(names))


def _check_evaluation(config: "Config") -> None:
    names = _eval_names(config)
    if config.balance.follow_rates and not (names and config.eval.every):
        raise UserError(
            "Balance.follow_rates sets rates at evaluations: set Eval.tasks and Eval.every."
        )
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
    size = int(data.vocabulary(names).vocab_size)
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
      UserError: there is no checkpoint at that path, or one of another program.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"No checkpoint at {folder}: it is {_what(folder)}.")
    if foreign := _foreign(folder):
        raise UserError(
            f"{folder} holds a checkpoint of {foreign}, not of mtl_jax: run `mtl-jax convert "
            f"{path} DST --to mtl_jax` first, and name DST instead."
        )
    folder, number = locate(folder)
    checkpointer = Checkpointer(folder, read_only=True)
    if checkpointer.latest() is None:
        raise UserError(
            f"No checkpoint of mtl_jax in {folder}: name a run directory or a step in it. One of "
            f"another program is converted first: `mtl-jax convert {path} DST --to mtl_jax`."
        )
    return checkpointer, number


def _what(folder: Path) -> str:
    return "a file, not a folder" if folder.exists() else "not there"


def _foreign(folder: Path) -> str:
    """The program whose checkpoint lies in a folder, or nothing."""
    weights = [p for kind in ("*.safetensors", "*.bin", "*.index.json") for p in folder.glob(kind)]
    if (folder / "config.json").is_file() and weights:
        return "Hugging Face"
    # A T5X checkpoint: a folder of arrays beside one file that lists them.
    is_t5x = (folder / "checkpoint").is_file() and not any(folder.glob("*.index"))
    return "T5X" if is_t5x else ""


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
        number = processes.from_primary(checkpointer.latest()) if number is None else number
        session.check_model(checkpointer.meta(number), path)
        params, _ = checkpointer.restore_parameters(number, session.abstract_state.params)
    return params, number or 0


def measured_mixture(session: Session, seconds: float = 60.0) -> EffectiveMixture:
    """The training mixture with shares of tokens and expected epochs; measures for so long."""
    cfg = session.config
    owners = {name: session.block_of(name) for name in data.task_names(cfg.data.mixture)}
    prompt = embeddings.prompt_ids(session.sharing)
    shards = cfg.data.num_shards or sharding.readers(session.mesh)[1]
    return effective_mixture.measure(cfg.data, cfg.run.steps, owners, prompt, seconds, shards)


def mixture_text(session: Session, measured: EffectiveMixture | None = None) -> str:
    """The training mixture as a table: tasks, examples, rates, shares, expected epochs."""
    measured = measured_mixture(session) if measured is None else measured
    return measured.text(data.held_out(session.config.mixture))


def tokenizer_files(session: Session) -> dict[str, bytes]:
    """What the run directory keeps beside its checkpoints, so that they can be used alone.

    The tasks' vocabulary, and all that the checkpoint carries along from which the run starts: it
    goes back to Hugging Face with the run's.
    """
    cfg = session.config
    shared = data.vocabulary(data.task_names(cfg.data.mixture))
    # Vocabularies of other kinds are for tasks that are never read outside of their run.
    known = (seqio.SentencePieceVocabulary, seqio.ByteVocabulary, vocabulary.TokenizerVocabulary)
    files = vocabulary.files(shared) if isinstance(shared, known) else {}
    if cfg.run.restore_from:
        checkpointer, _ = open_checkpoint(cfg.run.restore_from)
        checkpointer.close()
        folder = checkpointer.directory.parent / tokenizer.FOLDER
        if folder.is_dir():
            files |= {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return files
