"""States of a run whose tasks have parameters of their own: each task's by its own T5."""

import numpy as np
import pytest
import sharing_plans as plans
import test_sharing_runs as runs

import mtl_jax
from mtl_jax import cli
from mtl_jax.analysis.files import read_object
from mtl_jax.errors import UserError

TASKS = ("tiny_copy", "tiny_first")


@pytest.mark.parametrize("name", sorted(plans.ROOMS))
def test_the_name_of_what_a_task_is_evaluated_with(name):
    plan = plans.plan(name)
    for task in (*plan.names, "nobody's", "a_new"):
        known = plan.evaluated_as(task)
        if known is None:
            assert not plan.by_task
        else:
            assert plan.task_id(known) == plan.evaluation_id(task)


@pytest.mark.slow
def test_states_are_those_of_each_task(tmp_path):
    run = tmp_path / "run"
    assert cli.main(runs.flags(run, Run__steps=1, **runs.as_flags(runs.SHARING))) == 0
    assert cli.main(["report", str(run), "--representations", "--examples", "5"]) == 0
    found = read_object(run / "analysis" / "representations.json")
    assert found["tasks"] == ["copy", "first"]
    assert {"value", "null_mean"} <= found["probe_accuracy"].keys()
    with np.load(run / "analysis" / "representations.npz") as stored:
        states_ND, labels_N = stored["states"], stored["labels"]
    texts = [a + b for a, b in zip(("ab", "ba", "cab", "abc", "bb"), 5 * ("ab",), strict=True)]
    for number, task in enumerate(TASKS):
        own = mtl_jax.load(run, inputs_length=16, task=task).embed(texts)
        np.testing.assert_array_equal(states_ND[labels_N == number], own)
    # What one task's T5 makes of the same texts is not what the other's does.
    assert not np.allclose(states_ND[labels_N == 0], states_ND[labels_N == 1])
    with pytest.raises(UserError, match="say whose are meant"):
        mtl_jax.load(run)
