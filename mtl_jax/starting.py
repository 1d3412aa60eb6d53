"""What a run starts from: fresh parameters, or those of a checkpoint, renamed or taken in part."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from mtl_jax import build, model, optim, patterns, processes, restore, sharding, step
from mtl_jax.balance.method import REFERENCE
from mtl_jax.checkpoint import Checkpointer
from mtl_jax.errors import UserError


def start_state(session: build.Session) -> step.TrainState:
    """Fresh parameters, or those of `Run.restore_from`; says on standard error which.

    Raises:
      UserError: the checkpoint is not there, or does not fit this run or `Run.restore_map`.
    """
    cfg = session.config.run
    if not cfg.restore_from:
        return session.fresh_state()
    checkpointer, number = build.open_checkpoint(cfg.restore_from)
    with checkpointer:
        number = processes.from_primary(checkpointer.latest()) if number is None else number
        meta = checkpointer.meta(number)
        place = f"{cfg.restore_from} at step {number:,}"
        # Sharing may start from a plain T5; all else is taken as it is.
        plain = "sharing" not in meta and not session.sharing.empty
        if not cfg.restore_map:
            session.check_model(meta, cfg.restore_from, plain=plain)
        if cfg.restore_optimizer == "keep":
            _check_tasks(session, meta, place)
            state = _kept(session, checkpointer, number, meta, place)
            print(f"Restored parameters and optimizer state from {place}", file=processes.screen())
            return state
        wanted = session.abstract_plain if plain else session.abstract_state.params
        if cfg.restore_map:
            given = _mapped(session, checkpointer, number, place, wanted)
        else:
            params, _ = checkpointer.restore_parameters(number, wanted)
            print(
                f"Restored the parameters from {place}; a fresh optimizer", file=processes.screen()
            )
            given = patterns.by_path(params)
        return session.shared_state(given) if plain else session.fresh_state(given)


def _check_tasks(session: build.Session, meta: dict[str, Any], place: str) -> None:
    """Refuses to take a method's state, which is by number of the task, for other tasks."""
    saved = meta.get("task_ids", {})
    names = sorted(saved, key=saved.__getitem__)
    if session.balancer.method is not None and names != list(session.sharing.names):
        raise UserError(
            f"{place} has a state of {session.config.balance.method} for its own tasks "
            f"({', '.join(names)[:200]}), and this run has others: train on the same tasks, or set "
            "Run.restore_optimizer = 'drop'."
        )


def _kept(
    session: build.Session,
    checkpointer: Checkpointer,
    number: int | None,
    meta: Mapping[str, Any],
    place: str,
) -> step.TrainState:
    """The whole state of a checkpoint; of a run, or converted with its optimizer's state."""
    abstract = session.abstract_state
    if "optimizer" not in meta:
        return checkpointer.restore(number, abstract)[0]
    # What has no state leaves traces in the chain's structure: the converted one is without them.
    bare = dataclasses.replace(session.config.optimizer, clip_norm=0.0, weight_decay=0.0)
    _check_optimizer(bare, meta["optimizer"], abstract.params, place)

    def as_chain(cfg: optim.OptimizerConfig, opt_state: Any) -> Any:
        made = jax.eval_shape(optim.make_optimizer(cfg).init, abstract.params)
        return jax.tree.unflatten(jax.tree.structure(made), jax.tree.leaves(opt_state))

    wanted = dataclasses.replace(abstract, opt_state=as_chain(bare, abstract.opt_state))
    state = checkpointer.restore(number, wanted)[0]
    return dataclasses.replace(state, opt_state=as_chain(session.config.optimizer, state.opt_state))


def _check_optimizer(
    cfg: optim.OptimizerConfig, saved: Mapping[str, Any], params: Any, place: str
) -> None:
    """Refuses the converted state of another optimizer; `saved` is `KeptOptimizer.description`."""
    drop = "or set Run.restore_optimizer = 'drop'."
    if cfg.name != saved["name"]:
        raise UserError(
            f"{place} holds the optimizer state of {saved['name']}, and Optimizer.name is "
            f"{cfg.name!r}: set Optimizer.name = {saved['name']!r}, {drop}"
        )
    if saved["momentum"] and not cfg.momentum:
        raise UserError(
            f"{place} holds the momentum of T5X's Adafactor, and Optimizer.momentum is 0: set it "
            f"to T5X's Adafactor.beta1, {drop}"
        )
    if cfg.momentum and not saved["momentum"]:
        raise UserError(
            f"{place} holds no momentum, and Optimizer.momentum is {cfg.momentum}: set it to 0, "
            f"{drop}"
        )
    least = saved["min_dim_size_to_factor"]
    made = [
        jax.eval_shape(optim.make_optimizer(one).init, params)
        for one in (cfg, dataclasses.replace(cfg, min_dim_size_to_factor=least))
    ]
    if made[0] != made[1]:
        raise UserError(
            f"{place} holds a state in which other matrices are factored than with "
            f"Optimizer.min_dim_size_to_factor = {cfg.min_dim_size_to_factor}: set it to {least}, "
            f"{drop}"
        )


def _mapped(
    session: build.Session, checkpointer: Checkpointer, number: int | None, place: str, params: Any
) -> dict[str, jax.Array]:
    """The parameters that `Run.restore_map` takes from a checkpoint, by path."""
    wanted = patterns.by_path(params)
    stored = checkpointer.parameters(number)
    made = restore.plan(session.config.run.restore_map, wanted)
    restore.check(made, wanted, stored, place)
    given: dict[str, jax.Array] = {}
    for part in restore.rounds(made):
        sought = patterns.as_tree({source: wanted[path] for source, path in part.items()})
        found, _ = checkpointer.restore_parameters(number, sought, some=True)
        given |= {part[source]: array for source, array in patterns.by_path(found).items()}
    print(restore.summary(made, wanted, stored, place), file=processes.screen())
    for difference in session.model_differences(checkpointer.meta(number)):
        print(f"  another architecture: its {difference}", file=processes.screen())
    return given


def replicated_key(mesh: jax.sharding.Mesh, seed: int, number: int) -> jax.Array:
    """A key for random numbers, `number` of those of `seed`, whole on every device."""

    def make() -> jax.Array:
        return jax.random.fold_in(jax.random.key(seed), number)

    return jax.jit(make, out_shardings=sharding.replicated(mesh))()


def abstract_reference(session: build.Session) -> model.Params | None:
    """The parameters of the frozen model that the method compares with, as shapes; None: none."""
    return session.abstract_state.params if session.balancer.needs(REFERENCE) else None


def check_reference(session: build.Session) -> None:
    """Makes sure that the frozen model that the method compares with is there, and fits.

    Raises:
      UserError: no checkpoint there, or one of another model.
    """
    if session.balancer.needs(REFERENCE):
        path = session.balancer.method.reference  # type: ignore[union-attr]
        checkpointer, number = build.open_checkpoint(path)
        with checkpointer:
            session.check_model(checkpointer.meta(number), path)


def reference_params(session: build.Session) -> model.Params | None:
    """The parameters of the frozen model that the method compares with; None: none is needed.

    Raises:
      UserError: no checkpoint there, or one of another model.
    """
    if not session.balancer.needs(REFERENCE):
        return None
    path = session.balancer.method.reference  # type: ignore[union-attr]
    params, number = build.load_params(session, path)
    print(f"Compared with the frozen model of {path} at step {number:,}", file=processes.screen())
    return params
