"""Task embeddings and soft prompts: both are changes of the embedding's rows.

Letters: V vocabulary, D embedding, E entries, P rows of a prompt.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mtl_jax.errors import UserError
from mtl_jax.sharing.bank import SHARED, Leaf, Leaves, Make, key_of, pick, sharing_path
from mtl_jax.sharing.plan import SharingPlan

EMBEDDING = "token_embedder/embedding"


def _prompt_path(owner: str) -> str:
    return sharing_path(owner, "prompt", "embedding")


def _task_path(owner: str) -> str:
    return sharing_path(owner, "task_embedding", "embedding")


def prompt_ids(plan: SharingPlan) -> tuple[int, ...]:
    """The token ids that stand in front of every input: the last rows of the embedding."""
    return tuple(range(plan.base.vocab_size - plan.rooms.prompt.rows, plan.base.vocab_size))


def check_vocabulary(plan: SharingPlan, tasks_vocab_size: int) -> None:
    """Refuses prompts in rows that the tasks' vocabulary uses.

    Raises:
      UserError: says how large T5.vocab_size must be.
    """
    if (rows := plan.rooms.prompt.rows) and tasks_vocab_size + rows > plan.base.vocab_size:
        raise UserError(
            f"Prompt.length takes {rows} rows of the embedding beyond the tasks' vocabulary of "
            f"{tasks_vocab_size} ids, but T5.vocab_size = {plan.base.vocab_size}: set it to at "
            f"least {tasks_vocab_size + rows}."
        )


def leaves(plan: SharingPlan, base: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Adds the vectors.

    Task embeddings start at zero. Prompts start as rows of the embedding drawn at random (Lester et
    al. 2021, section 2.1.1), equal for all tasks; where prompts are added, those after the first
    owner's start at zero.
    """
    made, rooms = dict(base), plan.rooms
    size, length = plan.base.emb_dim, rooms.prompt.length
    if owner := rooms.sharing.task_embedding:
        shape = (plan.entries(owner), size)
        made[_task_path(owner)] = Leaf(("tasks", "embed"), lambda rng, plain: jnp.zeros(shape))
    for number, owner in enumerate(rooms.prompt.owners if length else ()):
        bank = () if owner == SHARED else (plan.entries(owner),)
        zero = number > 0 and rooms.prompt.combine == "add"
        made[_prompt_path(owner)] = Leaf(
            (*("tasks",) * len(bank), None, "embed"), _prompt_maker(plan, owner, bank, zero)
        )
    return made


def _prompt_maker(plan: SharingPlan, owner: str, bank: tuple[int, ...], zero: bool) -> Make:
    length, size = plan.rooms.prompt.length, plan.base.emb_dim

    def make(rng: jax.Array, plain: Mapping[str, jax.Array]) -> jax.Array:
        shape = (*bank, length, size)
        if zero:
            return jnp.zeros(shape, jnp.float32)
        used = plan.base.vocab_size - plan.rooms.prompt.rows
        rows = jax.random.randint(key_of(rng, _prompt_path(owner)), (length,), 0, used)
        return jnp.broadcast_to(jnp.take(plain[EMBEDDING], rows, axis=0), shape)

    return make


def apply(plan: SharingPlan, plain: Leaves, params: Leaves, task: jax.Array) -> Leaves:
    """The parameters of a plain T5, by path, with the task's embedding.

    The task's vector is added to all rows, then the prompt is written over the last ones.
    """
    embedding_VD, rooms = plain[EMBEDDING], plan.rooms
    if owner := rooms.sharing.task_embedding:
        vector_D = pick(params[_task_path(owner)], plan.index(owner, task))
        embedding_VD = embedding_VD + vector_D[None]
    if rooms.prompt.length:
        prompts = []
        for owner in rooms.prompt.owners:
            rows = params[_prompt_path(owner)]
            prompts.append(rows if owner == SHARED else pick(rows, plan.index(owner, task)))
        prompt_PD = jnp.concatenate(prompts) if rooms.prompt.combine == "concat" else sum(prompts)
        embedding_VD = jax.lax.dynamic_update_slice_in_dim(
            embedding_VD, prompt_PD, plan.base.vocab_size - rooms.prompt.rows, axis=0
        )
    return {**plain, EMBEDDING: embedding_VD}
