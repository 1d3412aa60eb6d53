"""Task modules, the values of a mixture and rates by size; more of mixtures in test_data.py."""

import functools

import numpy as np
import pytest
import seqio
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax import task_info
from mtl_jax.data_config import DataConfig, MixtureConfig
from mtl_jax.errors import UserError
from mtl_jax.mixtures import build_mixture, load_modules, rates_of, unimax_shares
from mtl_jax.packing import TaskDraws
from mtl_jax.task_info import describe


def test_modules_are_imported_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_registrations.py").write_text("import os\nSEEN = os.environ['MTL_JAX_DATA']\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTL_JAX_DATA", "before")
    monkeypatch.syspath_prepend(str(tmp_path))
    load_modules(DataConfig(task_modules=["my_registrations"], data_dir="."))
    import my_registrations

    assert str(tmp_path) == my_registrations.SEEN
    with pytest.raises(UserError, match=r"no Python module 'my_registration'.*my_registrations"):
        load_modules(DataConfig(task_modules=["my_registration"]))
    with pytest.raises(UserError, match=r"Data\.data_dir: nowhere is not a folder"):
        load_modules(DataConfig(data_dir="nowhere"))


def test_a_mixture_without_a_name_is_refused_before_anything_is_read():
    with pytest.raises(UserError, match=r"Mixture\.tasks is given but Mixture\.name is not"):
        MixtureConfig(tasks=["a"])
    assert MixtureConfig().tasks == ()
    assert MixtureConfig("new", ["a", "b"]).tasks == ("a", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ny = = 2\n", r"broken\.py, line 2: SyntaxError: invalid syntax"),
        ("x = 1\n\nx / 0\n", r"broken\.py, line 3: ZeroDivisionError: division by zero"),
        ("import json\njson.loads('{')\n", r"broken\.py, line 2: JSONDecodeError"),
        ("import helper_of_broken\n", r"helper_of_broken\.py, line 2: KeyError: 'b'"),
        ("import not_installed\n", r"broken\.py, line 1: ModuleNotFoundError: .*'not_installed'"),
    ],
)
def test_modules_that_fail_name_the_line(tmp_path, monkeypatch, text, message):
    (tmp_path / "broken.py").write_text(text)
    (tmp_path / "helper_of_broken.py").write_text("a = {}\na['b']\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"Data\.task_modules: the import of 'broken' .*" + message):
        load_modules(DataConfig(task_modules=["broken"]))


def sized_task(name, size, dataset=""):
    """A task whose source says how many training examples it has; nothing is ever read."""
    source = seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: None,
        splits=["train"],
        num_input_examples={"train": size} if size else None,
    )
    seqio.TaskRegistry.add(name, source=source, output_features={}, preprocessors=[])
    if dataset:
        describe(name, dataset=dataset)


@pytest.fixture
def sized_tasks(monkeypatch):
    """Tasks size1 ... size1000 of datasets small (two tasks) and large (two); SeqIO is put back."""
    monkeypatch.setattr(seqio.TaskRegistry, "_REGISTRY", {})
    monkeypatch.setattr(seqio.MixtureRegistry, "_REGISTRY", {})
    monkeypatch.setattr(task_info, "_INFOS", {})
    for size, dataset in ((1000, "large"), (1, "small"), (100, "large"), (10, "small")):
        sized_task(f"size{size}", size, dataset)
    sized_task("unsized", None)


def test_unimax_golden(sized_tasks):
    """By hand: 4 and 40 of 400 are all that four epochs of 1 and 10 give; 178 for each other."""
    config = MixtureConfig("m", ["size*"], rates="unimax", max_epochs=4, budget=400)
    build_mixture(config)
    rates = rates_of("m")
    expected = {"size1": 0.01, "size10": 0.1, "size100": 0.445, "size1000": 0.445}
    assert rates == pytest.approx(expected, rel=1e-12)
    epochs = {name: 400 * rate / int(name[4:]) for name, rate in rates.items()}
    expected = {"size1": 4, "size10": 4, "size100": 1.78, "size1000": 0.178}
    assert epochs == pytest.approx(expected, rel=1e-12)
    assert build_mixture(config) == "m"  # the same again


@given(
    sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=30),
    max_epochs=st.floats(0.1, 100),
    budget=st.floats(1, 1e12),
)
def test_unimax_is_the_most_equal_that_repeats_nothing_too_often(sizes, max_epochs, budget):
    """The optimum by its conditions: a task gets less than the others only where its cap binds."""
    shares = np.array(unimax_shares(sizes, max_epochs, budget))
    limits = max_epochs * np.array(sizes)
    taken = shares * min(budget, limits.sum())
    assert shares.sum() == pytest.approx(1, rel=1e-12)
    assert (taken <= limits * (1 + 1e-9)).all()
    free = taken < limits * (1 - 1e-9)
    if free.any():
        np.testing.assert_allclose(taken[free], taken.max(), rtol=1e-9)


def test_unimax_needs_sizes(sized_tasks):
    with pytest.raises(UserError, match=r"'unsized' does not know its number of training examples"):
        build_mixture(MixtureConfig("m", ["*size*"], rates="unimax", max_epochs=1, budget=9))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1 / 0.3])
@pytest.mark.parametrize("maximum", [None, 50.0])
def test_rates_by_examples_are_seqios(sized_tasks, maximum, temperature):
    names = ["size1", "size10", "size100", "size1000"]
    build_mixture(MixtureConfig("m", names, maximum=maximum, temperature=temperature))
    rate = functools.partial(
        seqio.mixing_rate_num_examples, maximum=maximum, temperature=temperature
    )
    seqio.MixtureRegistry.add("seqio", [(name, rate) for name in names])
    assert rates_of("m") == rates_of("seqio")
    expected = [min(size, maximum or 1e9) ** (1 / temperature) for size in (1, 10, 100, 1000)]
    assert list(rates_of("m").values()) == pytest.approx(expected, rel=1e-12)


def test_cap_per_dataset_is_t0s(sized_tasks):
    """The two tasks of a dataset share the cap where they have more examples, and only there."""
    config = MixtureConfig("m", ["size*"], maximum_per_dataset=60)
    build_mixture(config)
    assert rates_of("m") == {"size1": 1, "size10": 10, "size100": 30, "size1000": 30}
    assert build_mixture(config) == "m"
    build_mixture(MixtureConfig("n", ["size*"], maximum_per_dataset=60, temperature=2.0))
    assert rates_of("n")["size100"] == pytest.approx(30**0.5, rel=1e-12)


def test_tasks_are_drawn_by_their_rates(sized_tasks):
    """Chi-square, 3 degrees of freedom: by chance above 25.9 once in 10^5; the seed is fixed."""
    build_mixture(MixtureConfig("m", ["size*"], rates="unimax", max_epochs=4, budget=400))
    rates = np.array([*rates_of("m").values(), 0.0])
    draws = TaskDraws(rates, seed=3, shard=0)
    counts = np.bincount([draws[i] for i in range(100_000)], minlength=5)
    expected = 100_000 * rates
    assert counts[4] == 0
    assert ((counts - expected)[:4] ** 2 / expected[:4]).sum() < 25.9


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rates": "unimax", "max_epochs": 1}, r"Mixture\.budget is missing"),
        ({"rates": "unimax", "budget": 1}, r"Mixture\.max_epochs is missing"),
        ({"rates": "unimax", "max_epochs": 1, "budget": 0}, r"Mixture\.budget must be positive"),
        ({"max_epochs": 1}, r"Mixture\.max_epochs is set, .* need Mixture\.rates='unimax'"),
        (
            {"rates": "unimax", "max_epochs": 1, "budget": 1, "temperature": 2.0},
            r"Mixture\.temperature is set, .* need Mixture\.rates='examples'; it is 'unimax'",
        ),
        ({"rates": {"a": 1}, "maximum_per_dataset": 2}, r"Mixture\.maximum_per_dataset is set"),
        ({"maximum": 1, "maximum_per_dataset": 2}, "two caps: remove one"),
    ],
)
def test_options_of_other_rates_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        MixtureConfig("m", ["a"], **values)
