"""A small T5, batches of three tasks and train steps under methods, for the tests of methods."""

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import model, objective, optim, patterns, step
from mtl_jax.balance.adaptive import DWA, DifficultyWeights, UncertaintyWeights
from mtl_jax.balance.balance_config import BalanceConfig
from mtl_jax.balance.balancer import make_balancer
from mtl_jax.balance.common_descent import IMTLG, MGDA, AlignedMTL, CAGrad, NashMTL, UPGrad
from mtl_jax.balance.famo import FAMO
from mtl_jax.balance.gradnorm import GradNorm
from mtl_jax.balance.group_dro import DoReMi, GroupDRO
from mtl_jax.balance.method import METHODS, Method
from mtl_jax.balance.surgery import GradVac, PCGrad
from mtl_jax.balance.weighting import RandomWeights, StaticWeights, TaskMean, TransferObjective

CFG = golden.config("1.1", num_encoder_layers=1, num_decoder_layers=2)
PARAMS = golden.params(CFG)
AXES = patterns.by_path(model.param_axes(CFG))
NAMES = ("a", "b", "c")
ADAMW = optim.OptimizerConfig(name="adamw", schedule="constant", learning_rate=0.01)
KEY = jax.random.key(3)
BLOCKS = 4
SETTINGS = objective.StepConfig(microbatches=BLOCKS, z_loss=1e-3)
BalanceConfig()  # imports all methods
REFERENCE = {"DoReMi": {"reference": "unused: the parameters are given"}}
TRANSFER = {"TransferObjective": {"source": ("a",), "target": ("b", "c")}}

# What DoReMi compares with.
FROZEN = jax.tree.map(lambda x: x * 0.9, PARAMS)


class OneOf(Method):
    """All of several methods in one program, compiled once; the state says which is at work."""

    def __init__(self, *methods):
        self.methods = {type(method).__name__: method for method in methods}
        self.needs = frozenset().union(*(method.needs for method in methods))

    def init(self, num_tasks, num_groups):
        states = {n: m.init(num_tasks, num_groups) for n, m in self.methods.items()}
        return jnp.int32(0), states

    def _at_work(self, state, one):
        """What `one` of (method, its state) returns, a pair that ends with the state after."""
        number, states = state

        def branch(name, method):
            def run(states):
                found, after = one(method, states[name])
                return found, states | {name: after}

            return run

        branches = [branch(name, method) for name, method in self.methods.items()]
        found, states = jax.lax.switch(number, branches, states)
        return found, (number, states)

    def weights(self, state, seen):
        weights_KN, state = self._at_work(
            state, lambda method, mine: _in_groups(*method.weights(mine, seen))
        )
        return weights_KN, state, {}

    def observe(self, state, seen, losses_after):
        return self._at_work(
            state, lambda method, mine: ((), method.observe(mine, seen, losses_after))
        )[1]


def _in_groups(weights, state, logs):
    return jnp.atleast_2d(weights), state


# Every method, set so that a step or two change its weights; tasks "a" and "c", or three of them.
OF_GRADIENTS = OneOf(
    *(PCGrad(), GradVac(beta=0.5), MGDA(), UPGrad(), CAGrad(), NashMTL(), IMTLG(), AlignedMTL()),
    GradNorm(lr=0.3),
)
OF_LOSSES = OneOf(
    StaticWeights({"*": 0.5, "c": 2.0}),
    TaskMean(),
    RandomWeights(),
    TransferObjective(["a"], ["*"], alpha=0.5, schedule="linear", steps=4),
    UncertaintyWeights(lr=0.3),
    DWA(temperature=0.1, window_steps=1),
    DifficultyWeights(decay=0.5, metric="likelihood"),
    FAMO(lr=0.3),
    GroupDRO(eta=0.5),
    DoReMi(smoothing=0.01, reference="given", every_n_steps=1),
)
EVERY_METHOD = [
    *(pytest.param(OF_GRADIENTS, name, id=name) for name in OF_GRADIENTS.methods),
    *(pytest.param(OF_LOSSES, name, id=name) for name in OF_LOSSES.methods),
]


def opposed():
    """Parameters under which what makes token 1 likelier makes token 2 less likely."""
    params = golden.params(CFG)
    kernel = params["decoder"]["logits_dense"]["kernel"]
    kernel[:, 2] = -kernel[:, 1]
    return params


def batch(tasks=(1, 2, 3, 2), seed=0, rows=8, mixed=False, targets=None):
    """Rows of uneven lengths; row r is of `tasks[r % 4]`, so that four microbatches hold one.

    With `targets` all target tokens of row r are `targets[r % 4]`: under the parameters `opposed`
    gradients of tasks with 1 and with 2 conflict (cosines of about -0.5).
    """
    random = np.random.RandomState(seed)
    real = (np.arange(6)[None] < random.randint(1, 7, (rows, 1))).astype(np.int32)
    tokens = random.randint(1, 32, (rows, 6)).astype(np.int32) * real
    ids = np.tile(np.array(tasks), rows // len(tasks))[:, None] * real
    if mixed:  # a row holds two tasks
        ids = np.where(np.arange(6)[None] < 2, ids, ids % 3 + 1) * real
    inputs = np.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    if targets:
        tokens = np.tile(np.array(targets, np.int32), rows // len(targets))[:, None] * real
    return {
        "encoder_input_tokens": random.randint(1, 32, (rows, 7)).astype(np.int32),
        "encoder_segment_ids": np.ones((rows, 7), np.int32),
        "decoder_input_tokens": inputs,
        "decoder_target_tokens": tokens,
        "decoder_segment_ids": real,
        "decoder_task_ids": ids.astype(np.int32),
        "decoder_loss_weights": real.astype(np.float32),
    }


def make_method(name):
    return METHODS[name](**(REFERENCE | TRANSFER).get(name, {}))


def balancer(method=None, names=NAMES, axes=None, **values):
    made = make_method(method) if isinstance(method, str) else method
    name = type(made).__name__ if made is not None else ""
    return make_balancer(BalanceConfig(method=name, **values), made, names, CFG, axes)


def of_one(methods, names=NAMES, axes=None):
    """A balancer of a `OneOf`."""
    return make_balancer(BalanceConfig(), methods, names, CFG, axes)


def working(state, methods, name):
    """A balancer's state with this one of the methods at work."""
    number, states = state.method
    chosen = number * 0 + list(methods.methods).index(name)  # it lies where the other did
    return dataclasses.replace(state, method=(chosen, states))


def initial(chosen, params=PARAMS, optimizer=ADAMW):
    params = jax.tree.map(jnp.asarray, params)
    opt_state = optim.make_optimizer(optimizer).init(params)
    return step.TrainState(jnp.int32(0), params, opt_state, chosen.init())


def stepper(chosen, settings=SETTINGS, optimizer=ADAMW):
    tasks = len(chosen.of_task) - 1
    return functools.partial(step.train_step, CFG, settings, optimizer, tasks, balancer=chosen)
