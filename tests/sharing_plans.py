"""Plans of every structure over the golden T5 and three tasks, and what tests do with them."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import incremental, model, objective, optim, patterns, step
from mtl_jax.packing import Example, Rows
from mtl_jax.sharing import tree
from mtl_jax.sharing.bank import owner_of
from mtl_jax.sharing.embeddings import prompt_ids
from mtl_jax.sharing.plan import SharingPlan, make_plan
from mtl_jax.sharing.sharing_config import (
    AdapterConfig,
    AdversaryConfig,
    ExpertsConfig,
    LoraConfig,
    PromptConfig,
    Rooms,
    SharingConfig,
)

NAMES = ("a", "b", "c")
CLUSTERS = {"a": "x", "[bc]": "y"}

ROOMS = {
    "levels": Rooms(
        SharingConfig(
            clusters=CLUSTERS,
            levels=(("encoder", "cluster", 0, 1), ("decoder", "task", 1, 2)),
            copies=(("decoder/decoder_norm/scale", "task"),),
            soft_penalty=0.5,
        )
    ),
    "lora": Rooms(lora=LoraConfig(rank=2, alpha=4.0, patterns=(".*attention/.*/kernel",))),
    "lora_cluster": Rooms(
        SharingConfig(clusters=CLUSTERS, copies=(("encoder/relpos_bias/.*", "cluster"),)),
        LoraConfig(rank=2, owner="cluster"),
    ),
    "lora_shared": Rooms(lora=LoraConfig(rank=2, owner="shared", patterns=("decoder/.*kernel",))),
    "inventory": Rooms(lora=LoraConfig(rank=2, owner="inventory", inventory=4)),
    "adapter": Rooms(adapter=AdapterConfig(dim=4)),
    "adapter_shared": Rooms(adapter=AdapterConfig(dim=4, owner="shared")),
    "task_embedding": Rooms(SharingConfig(task_embedding="task")),
    "prompt": Rooms(prompt=PromptConfig(length=3)),
    "prompts": Rooms(prompt=PromptConfig(length=2, owners=("shared", "task"), combine="concat")),
    "experts": Rooms(experts=ExpertsConfig(number=4, top_k=2, router_dim=8)),
    "experts_encoder": Rooms(experts=ExpertsConfig(number=3, top_k=3, stacks=("encoder",))),
    "adversary": Rooms(adversary=AdversaryConfig(weight=0.1, hidden_dim=8)),
    "everything": Rooms(
        SharingConfig(
            clusters=CLUSTERS,
            levels=(("decoder", "cluster", 0, 1),),
            copies=(("encoder/encoder_norm/scale", "task"),),
            soft_penalty=0.1,
            task_embedding="task",
        ),
        LoraConfig(rank=4, owner="inventory", inventory=3),
        AdapterConfig(dim=4),
        PromptConfig(length=2, owners=("shared", "task")),
        ExpertsConfig(number=3, top_k=2, stacks=("encoder",), balance_weight=0.01),
        AdversaryConfig(weight=0.1, hidden_dim=8),
    ),
}

# What "everything" cannot have at the same time: LoRA that tasks own, on layers that they own, too.
OWNED = Rooms(
    SharingConfig(
        clusters=CLUSTERS,
        levels=(("decoder", "task", 1, 2),),
        copies=(("encoder/relpos_bias/.*", "cluster"),),
        soft_penalty=0.5,
    ),
    LoraConfig(rank=2, alpha=4.0, patterns=(".*attention/.*/kernel",)),
    experts=ExpertsConfig(number=3, top_k=2, stacks=("encoder",), balance_weight=0.1),
    adversary=AdversaryConfig(weight=0.1, hidden_dim=0),
)


@functools.cache
def plan(name: str, **changes: int) -> SharingPlan:
    """The plan of `ROOMS`, or "owned", over the golden T5 with these changes."""
    return make_plan((ROOMS | {"owned": OWNED})[name], NAMES, golden.config("1.1", **changes))


@functools.cache
def start(plan: SharingPlan) -> dict:
    """The tree as a run starts with it, from the golden parameters."""
    plain = jax.tree.map(jnp.asarray, golden.params(plan.base))
    return jax.jit(functools.partial(tree.init, plan))(jax.random.key(0), plain)


@functools.cache
def perturbed(plan: SharingPlan) -> dict:
    """As after training: all leaves moved, so that no entry equals another."""
    made = {}
    for number, (path, leaf) in enumerate(sorted(patterns.by_path(start(plan)).items())):
        noise = np.random.RandomState(number).randn(*leaf.shape).astype(np.float32)
        made[path] = jnp.asarray(np.asarray(leaf) + 0.1 * noise)
    return patterns.as_tree(made)


def forward(plan: SharingPlan, params: dict, task: jax.Array, batch: dict) -> jax.Array:
    """Logits_BTV, by the model's own functions."""
    return plain_forward(plan.model_config, tree.plain(plan, params, task), batch)


def plain_forward(cfg: model.T5Config, plain: dict, batch: dict) -> jax.Array:
    segments = batch["encoder_segment_ids"]
    encoded = model.encode(cfg, plain, batch["encoder_input_tokens"], segments)
    hidden = model.decode(
        cfg,
        plain,
        encoded,
        batch["decoder_input_tokens"],
        segments_BT=batch["decoder_segment_ids"],
        cross_segments_BT=batch["decoder_segment_ids"],
        encoder_segments_BL=segments,
    )
    return model.logits(cfg, plain, hidden)


@functools.cache
def _compiled_logits(plan: SharingPlan):
    return jax.jit(functools.partial(forward, plan))


def logits(plan: SharingPlan, params: dict, task: int) -> np.ndarray:
    """Logits_BTV of the golden batch as of one task."""
    return np.asarray(_compiled_logits(plan)(params, jnp.int32(task), golden.batch()))


def _loss(logits_BTV: jax.Array, batch: dict) -> jax.Array:
    found = jax.nn.log_softmax(logits_BTV)
    picked = jnp.take_along_axis(found, batch["decoder_target_tokens"][..., None], -1)[..., 0]
    return -jnp.sum(picked * batch["decoder_loss_weights"])


def with_prompt(batch: dict, ids: tuple[int, ...]) -> dict:
    """The batch with these tokens in front of every input."""
    rows = len(batch["encoder_input_tokens"])
    ones = (1,) * len(ids)
    front = dict(encoder_input_tokens=ids, encoder_segment_ids=ones, encoder_task_ids=ones)
    return batch | {
        name: np.concatenate([np.tile(np.array(x, np.int32), (rows, 1)), batch[name]], axis=1)
        for name, x in front.items()
    }


def gradient_function(plan: SharingPlan, rows: int = 3):
    """(params, task) -> gradient of the summed loss of the golden batch, with the plan's prompt."""
    batch = with_prompt(golden.batch(), prompt_ids(plan))
    batch = {name: np.resize(x, (rows, *x.shape[1:])) for name, x in batch.items()}
    return jax.grad(lambda params, task: _loss(forward(plan, params, task, batch), batch))


@functools.cache
def _compiled_gradient(plan: SharingPlan):
    return jax.jit(gradient_function(plan))


def gradient(plan: SharingPlan, params: dict, task: int) -> dict:
    """See `gradient_function`; compiled once for a plan."""
    return _compiled_gradient(plan)(params, jnp.int32(task))


# ---------------------------------------------------------------------------------------------
# The train step
# ---------------------------------------------------------------------------------------------


def task_batch(plan: SharingPlan, tasks: tuple[int, ...], rows: int = 8, seed: int = 0) -> dict:
    """Two packed examples a row, with the plan's prompt; row r is of `tasks[r % len(tasks)]`.

    So as many microbatches as there are `tasks` hold one task each.
    """
    random, prompt = np.random.RandomState(seed), np.array(prompt_ids(plan), np.int32)
    made = []
    for row in range(rows):
        packed = Rows(1, 16, 8, pack=True)
        for _ in range(2):
            inputs, targets = (
                random.randint(1, plan.base.vocab_size - len(prompt), random.randint(1, 5))
                for _ in ("inputs", "targets")
            )
            example = Example(tasks[row % len(tasks)], np.append(prompt, inputs), targets)
            assert packed.place(example)
        made.append(packed.arrays())
    return {name: np.concatenate([x[name] for x in made]) for name in made[0]}


def midway(plan: SharingPlan, optimizer_cfg: optim.OptimizerConfig) -> step.TrainState:
    """As in the middle of a run: no moment is zero, so that momentum and decay move all."""
    params, random = perturbed(plan), np.random.RandomState(7)

    def moved(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 0:
            return jnp.full_like(leaf, 1000)  # updates done
        none = leaf.shape == (1,)  # of Adafactor, where a moment does not apply
        return leaf if none else jnp.asarray(0.01 * (0.5 + random.rand(*leaf.shape)), leaf.dtype)

    opt_state = jax.tree.map(moved, optim.make_optimizer(optimizer_cfg).init(params))
    return step.TrainState(jnp.int32(1000), params, opt_state)


def train_step(plan: SharingPlan, optimizer_cfg: optim.OptimizerConfig, microbatches: int):
    """(state, batch, key) -> (state after one update, metrics), not compiled."""
    fixed = plan.model_config, objective.StepConfig(microbatches), optimizer_cfg, len(plan.names)
    return functools.partial(step.train_step, *fixed, plan=plan)


def moved_entries(plan: SharingPlan, before: step.TrainState, after: step.TrainState) -> dict:
    """Which entries [E] of tasks' and clusters' banks an update has moved, by (path, owner).

    Of parameters and of the optimizer's state of them. Entries that have not moved are the same bit
    by bit.
    """
    found = {}
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, old), new in pairs:
        keys = tuple(str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path)
        owner = owner_of(keys)
        if owner in ("task", "cluster") and old.shape != (1,):
            assert old.shape[0] == plan.entries(owner), keys
            different = np.asarray(old).view(np.int32) != np.asarray(new).view(np.int32)
            found["/".join(keys), owner] = different.reshape(len(different), -1).any(axis=1)
    return found


def plain_gradient(cfg: model.T5Config, params: dict) -> dict:
    batch = golden.batch()
    objective = lambda params: _loss(plain_forward(cfg, params, batch), batch)  # noqa: E731
    return jax.jit(jax.grad(objective))(jax.tree.map(jnp.asarray, params))


def decoded_both_ways(cfg: model.T5Config, plain: dict) -> tuple[np.ndarray, np.ndarray]:
    """Logits_BTV of the golden batch by the parallel forward, and step by step with a cache."""
    batch = golden.batch()
    # Unpacked rows without padding between: every target position is decoded.
    batch["decoder_segment_ids"] = np.ones_like(batch["decoder_segment_ids"])
    parallel = jax.jit(functools.partial(plain_forward, cfg))(plain, batch)

    @jax.jit
    def stepwise(plain, batch):
        segments = batch["encoder_segment_ids"]
        encoded = model.encode(cfg, plain, batch["encoder_input_tokens"], segments)
        weights = incremental.prepare(cfg, plain)
        tokens_BT = batch["decoder_input_tokens"]
        cache = incremental.start_cache(cfg, weights, encoded, segments, tokens_BT.shape[1])
        found = []
        for n in range(tokens_BT.shape[1]):
            step_logits, cache = incremental.decode_step(
                cfg, weights, cache, tokens_BT[:, n : n + 1], jnp.int32(n)
            )
            found.append(step_logits[:, 0])
        return jnp.stack(found, axis=1)

    return np.asarray(parallel), np.asarray(stepwise(plain, batch))
