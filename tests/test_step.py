"""Losses, gradients and updates against the golden numbers of T5X and closed forms."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import loss, objective, optim, step
from mtl_jax.errors import UserError

LOSSES = {  # (version, z_loss, label_smoothing): sum over tokens
    ("1.1", 0.0, 0.0): 50.8338,
    ("1.1", 1e-4, 0.0): 50.85169,
    ("1.1", 1e-4, 0.1): 42.48265,
    ("1.0", 0.0, 0.0): 49.17667,
    ("1.0", 1e-4, 0.0): 49.19729,
    ("1.0", 1e-4, 0.1): 41.11606,
}
GRADIENT_NORMS = {"1.1": 70.82707, "1.0": 38.81269}
ADAFACTOR_LOSSES = {
    "1.1": [50.85169, 40.67164, 34.67275, 30.3365],
    "1.0": [49.19729, 42.44184, 38.51461, 34.92891],
}
PARAMETERS_AFTER = {"1.1": 3101.2332, "1.0": 2552.3779}
TOKENS = 12  # of the golden batch; T5X's golden losses are sums


@pytest.mark.parametrize("case", LOSSES)
def test_golden_losses(case):
    version, z_loss, smoothing = case
    batch = golden.batch()
    loss_BT, z_BT = loss.cross_entropy(
        golden.logits(version),
        batch["decoder_target_tokens"],
        z_loss=z_loss,
        label_smoothing=smoothing,
    )
    weights_BT = batch["decoder_loss_weights"]
    np.testing.assert_allclose(np.sum(loss_BT * weights_BT), LOSSES[case], rtol=2e-6)
    plain = LOSSES[version, 0.0, 0.0]
    if not smoothing:
        np.testing.assert_allclose(np.sum(z_BT * weights_BT), LOSSES[case] - plain, atol=1e-4)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_golden_adafactor_trajectory(version):
    """Four updates as T5X makes them, on stacked layers; the loss of all lies in task 1."""
    cfg = golden.config(version)
    # T5X's golden run sums the loss; gradients of sum and mean differ by a factor, which
    # Adafactor ignores up to its epsilon of 1e-30.
    optimizer = optim.OptimizerConfig(
        schedule="constant", learning_rate=0.01, min_dim_size_to_factor=8
    )
    settings = objective.StepConfig(z_loss=1e-4)
    params = jax.tree.map(jnp.asarray, golden.params(cfg))
    state = step.TrainState(
        jnp.zeros((), jnp.int32), params, optim.make_optimizer(optimizer).init(params)
    )
    update = jax.jit(functools.partial(step.train_step, cfg, settings, optimizer, 1))
    losses, norms = [], []
    for number in range(4):
        assert int(state.step) == number
        state, metrics = update(state, golden.batch(), jax.random.key(0))
        losses.append(float(metrics["loss"]) * TOKENS)
        norms.append(float(metrics["grad_norm"]) * TOKENS)
        np.testing.assert_allclose(metrics["task_loss_sum"], [0.0, losses[-1]], rtol=1e-6)
        np.testing.assert_array_equal(metrics["task_tokens"], [0, TOKENS])
        np.testing.assert_allclose(metrics["learning_rate"], 0.01)
    np.testing.assert_allclose(losses, ADAFACTOR_LOSSES[version], rtol=1e-5)
    np.testing.assert_allclose(norms[0], GRADIENT_NORMS[version], rtol=1e-5)
    total = sum(float(jnp.sum(jnp.abs(leaf))) for leaf in jax.tree.leaves(state.params))
    np.testing.assert_allclose(total, PARAMETERS_AFTER[version], rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_cross_entropy_with_soft_targets_in_numpy(smoothing):
    """The Kullback-Leibler divergence from the smoothed target, plus z-loss, in float64."""
    random = np.random.RandomState(0)
    logits_BTV = (3 * random.randn(2, 5, 11)).astype(np.float32)
    targets_BT = random.randint(0, 11, (2, 5)).astype(np.int32)
    exact = logits_BTV.astype(np.float64)
    log_partition_BT = np.log(np.exp(exact).sum(-1))
    log_softmax_BTV = exact - log_partition_BT[..., None]
    soft_BTV = np.full(exact.shape, smoothing / 10)
    np.put_along_axis(soft_BTV, targets_BT[..., None], 1 - smoothing, axis=-1)
    log_soft = np.log(np.where(soft_BTV > 0, soft_BTV, 1.0))
    expected = (soft_BTV * (log_soft - log_softmax_BTV)).sum(-1) + 0.01 * log_partition_BT**2
    loss_BT, z_BT = loss.cross_entropy(
        logits_BTV, targets_BT, z_loss=0.01, label_smoothing=smoothing
    )
    np.testing.assert_allclose(loss_BT, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(z_BT, 0.01 * log_partition_BT**2, rtol=1e-5)


def uneven_batch():
    """Eight rows of 1 to 6 target tokens, tasks 1 to 3, one row of padding only."""
    random = np.random.RandomState(5)
    lengths = [6, 1, 4, 0, 2, 6, 3, 1]
    real = np.arange(6)[None] < np.array(lengths)[:, None]
    tokens = random.randint(1, 32, (8, 6)).astype(np.int32) * real
    shifted = np.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    tasks = np.array([1, 2, 3, 1, 2, 3, 1, 1])[:, None] * real
    ones = real.astype(np.int32)
    return {
        "encoder_input_tokens": random.randint(1, 32, (8, 7)).astype(np.int32),
        "encoder_segment_ids": np.ones((8, 7), np.int32),
        "decoder_input_tokens": (shifted * ones).astype(np.int32),
        "decoder_target_tokens": tokens,
        "decoder_segment_ids": ones,
        "decoder_task_ids": tasks.astype(np.int32),
        "decoder_loss_weights": real.astype(np.float32),
    }


CFG = golden.config("1.1", num_encoder_layers=1, num_decoder_layers=1)


@functools.cache
def uneven_gradients(parts):
    settings = objective.StepConfig(microbatches=parts, z_loss=1e-3, label_smoothing=0.1)
    compute = jax.jit(functools.partial(objective.gradients, CFG, settings, 4))
    return compute(golden.params(CFG), uneven_batch(), None)


@pytest.mark.parametrize("parts", [2, 4])
def test_microbatches_leave_the_gradient_unchanged(parts):
    grads, sums = uneven_gradients(parts)
    whole_grads, whole_sums = uneven_gradients(1)
    # Rounding alone, over eight seeds: 7e-7 of the whole gradient, and up to 2e-6 of a small leaf
    # whose terms cancel. A wrong normaliser is off by tenths.
    errors = jax.tree.map(
        lambda a, b: np.linalg.norm(np.asarray(a) - np.asarray(b)), grads, whole_grads
    )
    norms = jax.tree.map(lambda x: np.linalg.norm(np.asarray(x)), whole_grads)
    assert np.linalg.norm(jax.tree.leaves(errors)) <= 1e-6 * np.linalg.norm(jax.tree.leaves(norms))
    for error, norm in zip(jax.tree.leaves(errors), jax.tree.leaves(norms), strict=True):
        assert error <= 4e-6 * norm
    for name, value in whole_sums.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-6, err_msg=name)


def test_sums_per_task_in_numpy():
    """Tokens, losses and hits of every task from the logits, task by task; task 4 has none."""
    batch = uneven_batch()
    _, sums = uneven_gradients(1)
    logits_BTV = np.asarray(
        jax.jit(functools.partial(objective.forward, CFG))(golden.params(CFG), batch)
    )
    targets = batch["decoder_target_tokens"]
    loss_BT, z_BT = loss.cross_entropy(logits_BTV, targets, z_loss=1e-3, label_smoothing=0.1)
    hit_BT = logits_BTV.argmax(-1) == targets
    real = batch["decoder_loss_weights"] > 0
    for task in range(5):
        mine = real & (batch["decoder_task_ids"] == task)
        assert sums["task_tokens"][task] == mine.sum()
        assert sums["task_correct"][task] == hit_BT[mine].sum()
        total = np.asarray(loss_BT, np.float64)[mine].sum()
        np.testing.assert_allclose(sums["task_loss_sum"][task], total, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sums["task_tokens"], [0, 10, 3, 10, 0])
    np.testing.assert_allclose(sums["z_loss_sum"], np.asarray(z_BT)[real].sum(), rtol=1e-5)


def test_the_gradient_is_that_of_the_mean_over_all_tokens_of_the_batch():
    """Each row once more doubles sum and tokens alike: the gradient stays."""
    doubled = {name: np.concatenate([x, x]) for name, x in uneven_batch().items()}
    settings = objective.StepConfig(microbatches=4, z_loss=1e-3, label_smoothing=0.1)
    compute = jax.jit(functools.partial(objective.gradients, CFG, settings, 4))
    grads, sums = compute(golden.params(CFG), doubled, None)
    for grad, single in zip(
        jax.tree.leaves(grads), jax.tree.leaves(uneven_gradients(1)[0]), strict=True
    ):
        np.testing.assert_allclose(grad, single, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(sums["task_tokens"], 2 * uneven_gradients(1)[1]["task_tokens"])


def test_every_microbatch_takes_rows_of_every_device():
    rows = np.arange(8)[:, None]
    parts = objective.split_microbatches({"rows": rows}, 2)["rows"]
    # With the rows 0-3 on one device and 4-7 on another, both take part in both microbatches.
    assert parts[:, :, 0].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_dropout_differs_from_step_to_step_and_between_microbatches():
    cfg = golden.config("1.1", num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.5)
    settings = objective.StepConfig(microbatches=2)
    row = {name: np.repeat(x[:1], 2, axis=0) for name, x in uneven_batch().items()}
    row["decoder_task_ids"] = np.array([[1], [2]], np.int32) * row["decoder_segment_ids"]
    compute = jax.jit(functools.partial(objective.gradients, cfg, settings, 2))
    first, again, other = (
        compute(golden.params(cfg), row, jax.random.key(seed))[1]["task_loss_sum"]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first[1], first[2])  # the same row in the two microbatches


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"microbatches": 0}, "Step.microbatches must be at least 1, got 0"),
        ({"label_smoothing": 1.0}, "Step.label_smoothing must be in"),
        ({"z_loss": -1e-4}, "Step.z_loss must not be negative"),
    ],
)
def test_wrong_values_name_the_field(values, message):
    with pytest.raises(UserError, match=message):
        objective.StepConfig(**values)
