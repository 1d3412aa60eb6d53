"""Corners where methods, blocks, sharing and comparisons meet; each was wrong once."""

import argparse
import dataclasses

import balanced_steps as steps
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
import tiny_tasks

from mtl_jax import compare_config, data, optim
from mtl_jax.checkpoint import Checkpointer
from mtl_jax.packing import BlockDraws
from mtl_jax.sharing.plan import make_plan
from mtl_jax.sharing.sharing_config import LoraConfig, Rooms, SharingConfig
from mtl_jax.task_info import describe

pytestmark = pytest.mark.slow


@flax.struct.dataclass
class StateBeforeBalance:
    """The train state of runs from before there were methods."""

    step: jax.Array
    params: object
    opt_state: object


def test_a_checkpoint_from_before_there_were_methods_is_continued(tmp_path):
    state = steps.initial(steps.balancer())
    old = StateBeforeBalance(state.step + 3, state.params, state.opt_state)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(3, old, {}, {})
        checkpointer.wait()
        found, _, _ = checkpointer.restore(None, jax.eval_shape(lambda: state))
    assert int(found.step) == 3
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(old.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "how", ["microbatch", *(pytest.param(x, marks=pytest.mark.slow) for x in ("vmap", "sketch"))]
)
@pytest.mark.parametrize(
    ("groups", "freeze"),
    [
        pytest.param("enc_dec", "encoder/.*", marks=pytest.mark.slow),
        ("layer", "encoder/layers/.*"),
    ],
)
def test_a_group_may_be_frozen_as_a_whole(groups, freeze, how):
    optimizer = dataclasses.replace(steps.ADAMW, freeze=(freeze,))
    chosen = steps.balancer("MGDA", groups=groups, task_gradients=how)
    state = steps.initial(chosen, optimizer=optimizer)
    after, told = steps.stepper(chosen, optimizer=optimizer)(state, steps.batch(), steps.KEY)
    assert float(told["gram"][0].max()) == 0.0
    trained = optim.split(optimizer, after.params)[0]
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(trained))


class _Lengths(tiny_tasks.Pairs):
    """Inputs of one length."""

    def __init__(self, length):
        super().__init__(lambda text: text[:2])
        self._length = length

    def rows(self, split):
        return [{"inputs": "a" * self._length, "targets": "yes"} for _ in range(24)]


def _register(name, length):
    if name not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            name,
            source=_Lengths(length),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features=tiny_tasks.FEATURES,
            metric_fns=[],
        )
        describe(name, dataset=name)


@pytest.mark.parametrize("prompt", [(), tuple(range(300, 320))])
def test_examples_keep_the_rates_with_a_prompt_in_front(prompt):
    _register("review_short", 3)
    _register("review_long", 30)
    if "review_lengths" not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add("review_lengths", [("review_short", 1.0), ("review_long", 1.0)])
    cfg = data.DataConfig(
        mixture="review_lengths",
        inputs_length=64,
        targets_length=64,
        batch_size=8,
        blocks=4,
        prefetch=0,
    )
    ids = {"review_long": 1, "review_short": 2}
    with data.TrainStream(cfg, ids, prompt=prompt) as stream:
        drawn = data.examples_drawn([next(stream) for _ in range(100)][-1])
    # Rates are equal; without a prompt 100 batches come within 2 %.
    assert drawn["review_short"] == pytest.approx(drawn["review_long"], rel=0.1)


def test_all_pairs_of_tasks_meet_in_a_batch_now_and_then():
    tasks, blocks, batches = 12, 4, 5000
    draws = BlockDraws([1 / tasks] * tasks, blocks, seed=0)
    met = np.eye(tasks, dtype=bool)
    for batch in range(batches):
        found = sorted(set(draws[batch]))
        met[np.ix_(found, found)] = True
    # Independent draws would let a pair meet in about one batch of 12.
    assert met.all()


def test_a_weight_that_was_never_solved_is_of_the_scale_of_the_others():
    chosen = steps.balancer("PCGrad", every_n_steps=2)
    step = jax.jit(steps.stepper(chosen))
    state, _ = step(steps.initial(chosen), steps.batch((1, 2, 1, 2)), steps.KEY)
    _, told = step(state, steps.batch((1, 2, 3, 2)), steps.KEY)
    # PCGrad is a sum over tasks: 1 for each where nothing conflicts, never less.
    assert float(told["balance_weight"][0, 2]) >= 1.0


def test_macros_may_be_used_by_compare_alone():
    bindings = ["SEEDS=1", "Compare.seeds=%SEEDS", "Compare.arms={'plain': []}"]
    args = argparse.Namespace(
        gin_file=["models/t5_1_1_tiny.gin"],
        gin_bindings=[*bindings, "Run.directory=runs", "Run.steps=1"],
        gin_search_paths=[],
    )
    assert compare_config.load_args(args).plan.seeds == 1


def test_an_unknown_task_of_a_cluster_without_tasks_has_the_mean_of_all():
    rooms = Rooms(
        sharing=SharingConfig(clusters={"glue_a": "one", "glue_*": "two", "super_*": "one"}),
        lora=LoraConfig(rank=2, owner="cluster"),
    )
    plan = make_plan(rooms, ["glue_a", "super_x"], steps.CFG)
    assert plan.evaluation_id("glue_b") == 0  # nothing was trained for its cluster
