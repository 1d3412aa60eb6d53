"""A small T5, batches of three tasks and train steps under methods, for the tests of methods."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import model, objective, optim, patterns, step
from mtl_jax.balance.balance_config import BalanceConfig
from mtl_jax.balance.balancer import make_balancer
from mtl_jax.balance.method import METHODS

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


def batch(tasks=(1, 2, 3, 2), seed=0, rows=8, mixed=False):
    """Rows of uneven lengths; row r is of `tasks[r % 4]`, so that four microbatches hold one."""
    random = np.random.RandomState(seed)
    real = (np.arange(6)[None] < random.randint(1, 7, (rows, 1))).astype(np.int32)
    tokens = random.randint(1, 32, (rows, 6)).astype(np.int32) * real
    ids = np.tile(np.array(tasks), rows // len(tasks))[:, None] * real
    if mixed:  # a row holds two tasks
        ids = np.where(np.arange(6)[None] < 2, ids, ids % 3 + 1) * real
    return {
        "encoder_input_tokens": random.randint(1, 32, (rows, 7)).astype(np.int32),
        "encoder_segment_ids": np.ones((rows, 7), np.int32),
        "decoder_input_tokens": np.pad(tokens[:, :-1], ((0, 0), (1, 0))),
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


def initial(chosen, params=PARAMS, optimizer=ADAMW):
    params = jax.tree.map(jnp.asarray, params)
    opt_state = optim.make_optimizer(optimizer).init(params)
    return step.TrainState(jnp.int32(0), params, opt_state, chosen.init())


def stepper(chosen, settings=SETTINGS, optimizer=ADAMW):
    tasks = len(chosen.of_task) - 1
    return functools.partial(step.train_step, CFG, settings, optimizer, tasks, balancer=chosen)
