"""A mixture of experts whose router sees the task alone (Kudugunta et al. 2021).

A task's experts and their weights are the same for all of its tokens. So the mixture

    sum_e g_e act(x wi_e) wo_e

is one MLP: the wi of the chosen experts side by side, their wo, times g_e, one below the other.

Letters: X experts, K chosen, N layers, T tasks, C router's vector, D embedding, F mlp.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mtl_jax.sharing.bank import SHARED, Leaf, Leaves, copied, key_of, pick, sharing_path
from mtl_jax.sharing.plan import SharingPlan, is_expert
from mtl_jax.sharing.sharing_config import STACKS

TASKS = sharing_path("task", "router", "embedding")


def _router_path(stack: str) -> str:
    return sharing_path(SHARED, "router", f"{stack}/layers/kernel")


def leaves(plan: SharingPlan, base: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Adds the router and moves MLPs to banks of experts, which all start as the plain T5's."""
    cfg = plan.rooms.experts
    made: dict[str, Leaf] = {}
    for path, leaf in base.items():
        if is_expert(plan.rooms, path):
            made[sharing_path("experts", "copies", path)] = copied(cfg.number, leaf)
        else:
            made[path] = leaf
    if cfg.number:
        shape = (len(plan.names), cfg.router_dim)
        made[TASKS] = Leaf(
            ("tasks", None), lambda rng, plain: jax.random.normal(key_of(rng, TASKS), shape)
        )
        made |= {_router_path(stack): _router(plan, stack) for stack in cfg.stacks}
    return made


def _router(plan: SharingPlan, stack: str) -> Leaf:
    cfg = plan.rooms.experts
    shape = (getattr(plan.base, f"num_{stack}_layers"), cfg.router_dim, cfg.number)

    def make(rng: jax.Array, plain: Mapping[str, jax.Array]) -> jax.Array:
        normal = jax.random.normal(key_of(rng, _router_path(stack)), shape)
        return normal / jnp.sqrt(jnp.float32(cfg.router_dim))

    return Leaf(("layers", None, None), make)


def gates(
    plan: SharingPlan, params: Leaves, stack: str, task: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A task's experts in each layer: weights_NK, which add up to 1, and int32 chosen_NK.

    An unknown task has the mean of all tasks' vectors.
    """
    vector_C = pick(params[TASKS], plan.index("task", task))
    logits_NX = jnp.einsum("c,ncx->nx", vector_C, params[_router_path(stack)], precision="highest")
    top_NK, chosen_NK = jax.lax.top_k(logits_NX, plan.rooms.experts.top_k)
    return jax.nn.softmax(top_NK), chosen_NK


def apply(plan: SharingPlan, plain: Leaves, params: Leaves, task: jax.Array) -> Leaves:
    """The parameters of a plain T5, by path, whose MLPs are the task's experts side by side."""
    cfg, made = plan.rooms.experts, dict(plain)
    for stack in STACKS:
        names = [p for p in plan.axes if p.startswith(f"{stack}/layers/mlp/")]
        if stack in cfg.stacks:
            weights_NK, chosen_NK = gates(plan, params, stack, task)
        for path in names:
            is_out = path.endswith("/wo/kernel")
            if stack in cfg.stacks:
                # A bank [X, N, in, out] -> [N, K, in, out].
                bank = params[sharing_path("experts", "copies", path)].swapaxes(0, 1)
                mine = jnp.take_along_axis(bank, chosen_NK[..., None, None], axis=1)
                mine = mine * weights_NK[..., None, None] if is_out else mine
                # [N, D, K F] or [N, K F, D]
                mine = mine if is_out else mine.swapaxes(1, 2)
                layers, size = mine.shape[0], plan.base.emb_dim
                joined = (layers, -1, size) if is_out else (layers, size, -1)
                made[path] = mine.reshape(joined)
            else:
                more = (cfg.top_k - 1) * plan.base.mlp_dim
                edges = ((0, more), (0, 0)) if is_out else ((0, 0), (0, more))
                made[path] = jnp.pad(plain[path], ((0, 0), *edges))
    return made


def balance(plan: SharingPlan, params: Leaves, present_N: jax.Array) -> jax.Array:
    """The loss that spreads tasks over experts: weight X sum_x f_x P_x, mean over layers.

    f_x is the share of tasks that use expert x (divided by K), P_x the mean of their softmax (Fedus
    et al. 2021, equations 4 to 6, with tasks in the place of tokens). It is 1 times the weight
    where all experts serve equally many. The vectors of absent tasks get no gradient.
    """
    cfg = plan.rooms.experts
    tasks_TC = params[TASKS]
    tasks_TC = jnp.where(present_N[:, None], tasks_TC, jax.lax.stop_gradient(tasks_TC))
    losses = []
    for stack in cfg.stacks:
        logits_NTX = jnp.einsum("tc,ncx->ntx", tasks_TC, params[_router_path(stack)])
        _, chosen_NTK = jax.lax.top_k(logits_NTX, cfg.top_k)
        used_NX = jnp.mean(jax.nn.one_hot(chosen_NTK, cfg.number), axis=(1, 2))
        losses.append(jnp.sum(used_NX * jnp.mean(jax.nn.softmax(logits_NTX), axis=1), axis=-1))
    return cfg.balance_weight * cfg.number * jnp.mean(jnp.concatenate(losses))
