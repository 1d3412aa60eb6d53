"""Representations: known answers, independent solvers, and the nulls beside them."""

import json

import loadable
import numpy as np
import pytest
import scipy.optimize
from synthetic_runs import SETTINGS

from mtl_jax import cli
from mtl_jax.analysis import representations, state_files
from mtl_jax.errors import UserError


def clusters(spread=0.3, tasks=3, each=12, features=6, seed=0):
    generator = np.random.default_rng(seed)
    centres = 3 * np.eye(tasks, features)
    labels = np.repeat(np.arange(tasks), each)
    return centres[labels] + generator.normal(0, spread, (len(labels), features)), labels


def rotation(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def test_cka_ignores_rotation_scale_and_shift_and_nothing_else():
    generator = np.random.default_rng(1)
    for shape in ((40, 5), (5, 40)):  # few features, and few examples
        x = generator.normal(size=shape)
        assert representations.linear_cka(x, x) == pytest.approx(1.0)
        moved = 7 * x @ rotation(shape[1]) + 3
        assert representations.linear_cka(x, moved) == pytest.approx(1.0)
        stretched = x * np.geomspace(1, 100, shape[1])
        assert representations.linear_cka(x, stretched) < 0.97


def test_cka_is_the_alignment_of_centred_kernels():
    generator = np.random.default_rng(2)
    x, y = generator.normal(size=(8, 5)), generator.normal(size=(8, 20))
    centring = np.eye(8) - 1 / 8
    k, l = (centring @ a @ a.T @ centring for a in (x, y))  # noqa: E741
    expected = np.trace(k @ l) / np.sqrt(np.trace(k @ k) * np.trace(l @ l))
    assert representations.linear_cka(x, y) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(UserError, match="same examples, got 8 and 7"):
        representations.linear_cka(x, y[:7])
    with pytest.raises(UserError, match="not defined"):
        representations.linear_cka(x, np.ones((8, 3)))


def test_pca_against_the_covariance():
    states, _ = clusters()
    coordinates, shares = representations.pca(states, 3)
    values, vectors = np.linalg.eigh(np.cov(states.T))
    np.testing.assert_allclose(shares, values[::-1][:3] / values.sum(), rtol=1e-10)
    expected = (states - states.mean(axis=0)) @ vectors[:, ::-1][:, :3]
    np.testing.assert_allclose(np.abs(coordinates), np.abs(expected), atol=1e-10)
    turned = representations.pca(states[::-1], 3)[0][::-1]
    np.testing.assert_allclose(coordinates, turned, atol=1e-9, err_msg="signs are settled")
    with pytest.raises(UserError, match="no 7 principal components"):
        representations.pca(states, 7)


def test_silhouette_from_its_definition():
    states, labels = clusters(spread=2.0, each=5)
    values = []
    for i, point in enumerate(states):
        near = np.linalg.norm(states - point, axis=1)
        inside = near[(labels == labels[i]) & (np.arange(len(states)) != i)].mean()
        outside = min(near[labels == other].mean() for other in set(labels) - {labels[i]})
        values.append((outside - inside) / max(inside, outside))
    # Squared distances by the binomial formula lose some digits.
    assert representations.silhouette(states, labels) == pytest.approx(np.mean(values), abs=1e-7)
    alone = representations.silhouette(np.array([[0.0], [1.0], [5.0]]), [0, 0, 1])
    assert alone == pytest.approx((4.5 / 5.5 * 0 + (5 - 1) / 5 + (4 - 1) / 4) / 3)


def test_between_share_is_one_for_points_and_zero_for_equal_means():
    assert representations.between_share(np.array([[0.0], [0.0], [2.0]]), [0, 0, 1]) == 1.0
    assert representations.between_share(np.array([[0.0], [2.0], [0.0], [2.0]]), [0, 0, 1, 1]) == 0


def test_the_probe_reaches_the_minimum_that_scipy_finds():
    states, labels = clusters(spread=2.5)
    penalty = 1e-2
    inputs = np.c_[states, np.ones(len(states))]

    def objective(flat):
        weights = flat.reshape(7, 3)
        logits = inputs @ weights
        losses = scipy.special.logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]
        return losses.mean() + penalty / 2 * (weights[:-1] ** 2).sum()

    expected = scipy.optimize.minimize(objective, np.zeros(21), method="BFGS")
    found = representations.fit_probe(states, labels, 3, penalty)
    # BFGS with numerical gradients ends within 1e-6 of the minimum.
    assert objective(found.ravel()) <= expected.fun + 1e-6


def test_planted_tasks_are_told_and_shuffled_ones_are_not():
    states, labels = clusters()
    for statistic, least in (
        (representations.probe_accuracy, 1.0),
        (representations.silhouette, 0.5),
        (representations.between_share, 0.8),
    ):
        found = representations.with_null(statistic, states, labels, shuffles=4)
        assert found.value >= least
        assert found.null_mean <= found.null_high < found.value
    # A third is chance; five standard errors of 36 draws above it is 0.73.
    accuracy = representations.with_null(representations.probe_accuracy, states, labels, shuffles=4)
    assert accuracy.null_high < 0.73
    noise = np.random.default_rng(5).normal(size=(60, 6))
    assert representations.probe_accuracy(noise, np.arange(60) % 3) < 0.65


def test_what_cannot_be_told_apart_is_refused():
    states, labels = clusters()
    with pytest.raises(UserError, match="at least two tasks"):
        representations.silhouette(states, np.zeros(len(states)))
    with pytest.raises(UserError, match="as many examples of every task, one has 3"):
        representations.probe_accuracy(states[:-9], labels[:-9])
    with pytest.raises(UserError, match="need as many tasks"):
        representations.between_share(states, labels[:-1])
    with pytest.raises(UserError, match="finite numbers"):
        representations.pca(np.full((3, 2), np.nan))


def test_states_of_runs_are_compared_only_on_the_same_inputs(tmp_path):
    states, labels = clusters()
    names, texts = ["a", "b", "c"], [str(i) for i in range(len(states))]
    folders = {name: tmp_path / name for name in ("one", "two", "three")}
    state_files.save_states(folders["one"], states, labels, names, texts, 7)
    assert state_files.align(folders) is None, "one run alone"
    state_files.save_states(folders["two"], states @ rotation(6), labels, names, texts, 7)
    found = state_files.align(folders)
    assert found["runs"] == ["one", "two"]
    np.testing.assert_allclose(found["cka"], 1.0, atol=1e-5)  # states are float32
    assert found["null_mean"] < 0.5
    state_files.save_states(folders["three"], states, labels, names, texts[::-1], 7)
    assert state_files.align(folders) is None
    (folders["two"] / "representations.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"representations\.npz is damaged"):
        state_files.align(folders)


@pytest.fixture(scope="module")
def loadable_run(tmp_path_factory):
    """A run directory with a checkpoint of a tiny model, evaluated on two tasks."""
    run = loadable.save(tmp_path_factory.mktemp("run"))
    values = {
        "Data.task_modules": ("tiny_tasks",),
        "Eval.tasks": ("tiny_copy", "tiny_first"),
        "Eval.inputs_length": 16,
        "Eval.targets_length": 8,
        "Run.directory": str(run),
        "Run.steps": SETTINGS["Run.steps"],
    }
    text = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    (run / "config.gin").write_text(text)
    return run


def test_the_report_embeds_inputs_of_each_task(loadable_run, capsys):
    assert cli.main(["report", "--debug", "--representations", str(loadable_run)]) == 0
    assert "States: " in capsys.readouterr().out
    described = json.loads((loadable_run / "analysis" / "representations.json").read_text())
    assert described["tasks"] == ["copy", "first"]
    assert described["step"] == 7
    assert described["labels"] == [0] * 5 + [1] * 5
    with np.load(loadable_run / "analysis" / "representations.npz") as stored:
        assert stored["states"].shape == (10, loadable.CFG.emb_dim)
        # Both tasks have the same inputs, so nothing tells them apart.
        np.testing.assert_allclose(stored["states"][:5], stored["states"][5:], atol=1e-6)
    assert described["between_share"]["value"] == pytest.approx(0.0, abs=1e-9)
    assert "What the encoder makes of the tasks" in (loadable_run / "report.html").read_text()


def test_too_few_examples_are_refused(loadable_run, capsys):
    flags = ["report", "--representations", "--examples", "4", str(loadable_run)]
    assert cli.main(flags) == 1
    assert "--examples must be at least 5" in capsys.readouterr().err
