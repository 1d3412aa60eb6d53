"""How a batch is divided, where each microbatch must hold one task, or tasks that are alike."""

import dataclasses
import math
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from mtl_jax import sharding, task_info
from mtl_jax.balance.balancer import Balancer
from mtl_jax.errors import UserError
from mtl_jax.sharing.plan import SharingPlan

if TYPE_CHECKING:
    from mtl_jax.config import Config


def owner(task: str, by: str) -> str:
    """What a task counts as in the update, for `Balance.by`."""
    about = task_info.info(task)
    return {"task": task, "dataset": about.dataset, "family": about.family or about.dataset}[by]


def block_of(task: str, config: "Config", balancer: Balancer, plan: SharingPlan) -> str:
    """What a block of rows is of, where a batch has blocks; tasks of the same may share one."""
    if not plan.by_task:
        return owner(task, config.balance.by)
    alike = plan.alike(task)
    return f"{alike}/{owner(task, config.balance.by)}" if balancer.wants_blocks else alike


def with_blocks(config: "Config", mesh: Mesh, balancer: Balancer, plan: SharingPlan) -> "Config":
    """The configuration with one task in each microbatch, where that is needed or asked for.

    Raises:
      UserError: the batch cannot be divided so.
    """
    blocks, parts = config.data.blocks, config.step.microbatches
    if not blocks and not balancer.wants_blocks and not plan.by_task:
        return config
    if not blocks:
        shards = config.data.num_shards or sharding.readers(mesh)[1]
        rows = config.data.batch_size // math.lcm(sharding.replicas(mesh), shards)
        wanted = len({block_of(task, config, balancer, plan) for task in plan.names})
        blocks = parts if parts > 1 else _blocks(rows, wanted)
    if parts not in (1, blocks):
        raise UserError(
            f"Step.microbatches = {parts} and Data.blocks = {blocks} must be the same where each "
            "microbatch holds one task: set one of the two."
        )
    if balancer.wants_blocks and blocks < 2:
        raise UserError(
            f"{config.balance.method or 'Balance.monitor_every'} needs microbatches of one task "
            f"each, but a batch of {config.data.batch_size} rows cannot be divided: set a larger "
            "Data.batch_size, or Balance.task_gradients = 'vmap'."
        )
    if balancer.method is not None and blocks < 2:
        raise UserError(
            f"{config.balance.method} shares an update among tasks, but with parameters of tasks a "
            f"batch of {config.data.batch_size} rows, which cannot be divided, holds one task: set "
            "a larger Data.batch_size."
        )
    sharding.validate(mesh, config.model, config.data.batch_size, blocks)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, blocks=blocks),
        step=dataclasses.replace(config.step, microbatches=blocks),
    )


def _blocks(rows: int, tasks: int) -> int:
    """The fewest blocks that could give each task one of its own, or as many as `rows` allows.

    Where rates are uneven, a task with a share of less than one block is not in every batch.
    """
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    return next((n for n in divisors if n >= tasks), divisors[-1])


def check_sharing(config: "Config", balancer: Balancer, plan: SharingPlan) -> None:
    """Refuses ways to share the update that do not go with ways to share parameters.

    Raises:
      UserError: names both.
    """
    if plan.rooms.adversary.weight and balancer.every:
        name = config.balance.method or "Balance.monitor_every"
        raise UserError(
            f"Adversary.weight and {name} do not go together: an adversary is of all tasks, and "
            "has no part in the gradients of single ones. Choose another Balance.method, or none."
        )
    if plan.owned and balancer.every and config.balance.groups in ("layer", "last_shared"):
        raise UserError(
            f"Balance.groups = {config.balance.groups!r} needs all layers in one stack, but some "
            "are of tasks or clusters (Sharing, Adapter): choose 'whole_model' or 'enc_dec'."
        )
