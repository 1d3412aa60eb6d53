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
from mtl_jax.mixtures import (
    build_mixture,
    held_out,
    leave_one_out,
    load_modules,
    rates_of,
    task_names,
    unimax_shares,
)
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


def sized_task(name, size, dataset="", family=""):
    """A task whose source says how many training examples it has; nothing is ever read."""
    source = seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: None,
        splits=["train"],
        num_input_examples={"train": size} if size else None,
    )
    seqio.TaskRegistry.add(name, source=source, output_features={}, preprocessors=[])
    if dataset:
        describe(name, dataset=dataset, family=family)


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


def test_a_dataset_together_counts_for_no_more_than_its_cap(sized_tasks):
    """1,100 examples in two tasks become 60, in the proportion of the tasks; 11 stay 11."""
    config = MixtureConfig("m", ["size*"], maximum_dataset_total=60)
    build_mixture(config)
    expected = {"size1": 1, "size10": 10, "size100": 60 / 11, "size1000": 600 / 11}
    assert rates_of("m") == pytest.approx(expected, rel=1e-12)
    assert build_mixture(config) == "m"
    build_mixture(MixtureConfig("n", ["size*"], maximum_dataset_total=60, temperature=2.0))
    assert rates_of("n")["size1000"] == pytest.approx(60**0.5 * 10 / 11, rel=1e-12)
    # A dataset weighs no more for having more prompts: 11 examples in one task or in two.
    assert rates_of("n")["size1"] + rates_of("n")["size10"] == pytest.approx(11**0.5, rel=1e-12)


def test_caps_and_rates_may_name_what_is_held_out(sized_tasks):
    out = {"task": ["size10*"]}
    caps = {"size10, size100*": 50.0, "size1": 0.5}
    build_mixture(MixtureConfig("m", ["size*"], maximum=caps, hold_out=out))
    assert rates_of("m") == {"size1": 0.5}
    rates = {"size1": 2.0, "size100": 1.0}
    build_mixture(MixtureConfig("r", ["size*"], rates=rates, hold_out=out))
    assert rates_of("r") == {"size1": 2.0}
    parts = {"size10, size1": 1.0, "size100*": 1.0}
    build_mixture(MixtureConfig("p", parts=parts, maximum=caps, hold_out=out))
    assert rates_of("p") == {"size1": 1.0}
    with pytest.raises(UserError, match=r"'size2' is none of the mixture's tasks"):
        build_mixture(MixtureConfig("n", ["size*"], maximum={"size2": 1}, hold_out=out))


def test_globs_take_only_what_is_for_training(sized_tasks, caplog):
    sized_task("size5", 5)
    describe("size5", dataset="small", trained=False)
    seqio.MixtureRegistry.add("inner", [("size5", 1.0), ("size1", 1.0)])
    build_mixture(MixtureConfig("m", ["size*"], maximum={"size5": 2}, hold_out={"task": ["size5"]}))
    assert task_names("m") == ["size1", "size10", "size100", "size1000"]
    assert "Mixture m: 1 tasks that globs fit are not for training" in caplog.text
    build_mixture(MixtureConfig("parts", parts={"size1*": 1.0}))
    assert "size5" not in task_names("parts")
    for name, tasks in (("named", ["size?", "size5"]), ("opened", ["inner"])):
        build_mixture(MixtureConfig(name, tasks))
        assert task_names(name) == ["size1", "size5"]
    build_mixture(MixtureConfig("by_glob", ["inne?"]))
    assert task_names("by_glob") == ["size1", "size5"]
    with pytest.raises(UserError, match=r"all 1 tasks that 'size\[5\]' fits are for evaluation"):
        build_mixture(MixtureConfig("none", ["size[5]"]))


def test_the_two_caps_on_t0s_own_example(monkeypatch, sized_tasks):
    """Nine prompts of 400,000 rows: 3.6 million by T0's cap of 500,000, 500,000 by the other."""
    names = [f"prompt{i}" for i in range(9)]
    for name in names:
        sized_task(name, 400_000, "news")
    build_mixture(MixtureConfig("t0", names, maximum_per_dataset=500_000))
    build_mixture(MixtureConfig("sane", names, maximum_dataset_total=500_000))
    assert sum(rates_of("t0").values()) == 3_600_000
    assert sum(rates_of("sane").values()) == pytest.approx(500_000, rel=1e-12)


def test_caps_by_name_and_glob(sized_tasks):
    """A name beats a glob, and a task that no cap fits has none."""
    caps = {"size10*": 50.0, "size100": 70.0}
    build_mixture(MixtureConfig("m", ["size*"], maximum=caps))
    assert rates_of("m") == {"size1": 1, "size10": 10, "size100": 70, "size1000": 50}
    two = MixtureConfig("n", ["size*"], maximum={"size1": 1}, maximum_dataset_total={"size1": 9})
    with pytest.raises(UserError, match=r"maximum and Mixture\.maximum_dataset_total are two caps"):
        build_mixture(two)
    # Only the tasks that a cap is for have it together.
    half = MixtureConfig("h", ["size*"], maximum_dataset_total={"size1, size10": 9, "size100": 5})
    build_mixture(half)
    expected = {"size1": 9 / 11, "size10": 90 / 11, "size100": 5, "size1000": 1000}
    assert rates_of("h") == pytest.approx(expected, rel=1e-12)
    with pytest.raises(UserError, match=r"Mixture\.maximum: 'sizes' is none of"):
        build_mixture(MixtureConfig("n", ["size*"], maximum={"sizes": 9}))


def test_parts_have_the_weights_of_all_their_tasks(sized_tasks):
    """By hand. A mixture keeps the rates inside it; other parts have those of Mixture.rates."""
    seqio.MixtureRegistry.add("inner", [("size1", 3.0), ("size10", 1.0)])
    config = MixtureConfig(
        "m", parts={"inner": 0.4, "size100, size1000": 0.6}, maximum={"size1000": 500}
    )
    assert build_mixture(config) == build_mixture(config) == "m"
    expected = {"size1": 0.3, "size10": 0.1, "size100": 0.1, "size1000": 0.5}
    assert rates_of("m") == pytest.approx(expected, rel=1e-12)
    build_mixture(MixtureConfig("n", parts={"size10*": 3, "size1": 1}, rates="equal"))
    expected = {"size1": 1, "size10": 1, "size100": 1, "size1000": 1}
    assert rates_of("n") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parts": {"size*": 1, "size1": 1}}, r"'size1' is in 'size\*' and in 'size1'"),
        ({"parts": {"size1": 1, "sise2": 1}}, r"No task or mixture 'sise2' is registered"),
        ({"parts": {"size1": 0}}, r"Mixture\.parts\['size1'\] must be a positive number, not 0"),
        ({"parts": {"size1": 1}, "tasks": ["size10"]}, "both say which tasks are mixed"),
        (
            {"parts": {"size1": 1}, "rates": "unimax", "max_epochs": 1, "budget": 1},
            "shares a budget among all tasks",
        ),
        ({"parts": {"size1": 1}, "rates": {"size1": 0}}, "of all tasks of 'size1' are zero"),
    ],
)
def test_parts_that_cannot_be(sized_tasks, values, message):
    with pytest.raises(UserError, match=message):
        build_mixture(MixtureConfig("m", **values))


@pytest.fixture
def families(sized_tasks):
    """Six tasks: two prompts of qqp, mrpc (paraphrase), rte and cb (nli), and one of no family."""
    sized_task("qqp_a", 100, "glue_qqp", "paraphrase")
    sized_task("qqp_b", 100, "glue_qqp", "paraphrase")
    sized_task("mrpc_a", 40, "glue_mrpc", "paraphrase")
    sized_task("rte_a", 20, "rte", "Natural Language Inference")
    sized_task("cb_a", 5, "cb", "Natural Language Inference")
    sized_task("other", 7, "other")
    return ["qqp_a", "qqp_b", "mrpc_a", "rte_a", "cb_a", "other"]


@pytest.mark.parametrize(
    ("hold_out", "gone"),
    [
        ({"dataset": ["glue_qqp"]}, ["qqp_a", "qqp_b"]),
        ({"family": ["Natural*"]}, ["rte_a", "cb_a"]),
        ({"task": ["qqp_b", "cb_*"], "dataset": ["other"]}, ["qqp_b", "cb_a", "other"]),
    ],
)
def test_what_is_held_out_is_not_in_the_mixture(families, hold_out, gone):
    config = MixtureConfig("m", families, hold_out=hold_out)
    build_mixture(config)
    assert held_out(config) == gone
    assert sorted([*task_names("m"), *gone]) == sorted(families)
    # What stays has the rates that it had.
    build_mixture(MixtureConfig("all", families))
    assert rates_of("m") == {n: r for n, r in rates_of("all").items() if n not in gone}
    # A part that is held out as a whole is gone, and the others keep their weights.
    parts = {"qqp_*": 2.0, "rte_a, cb_a": 1.0, "mrpc_a, other": 1.0}
    build_mixture(MixtureConfig("p", parts=parts, hold_out=hold_out))
    rates = rates_of("p")
    for part, weight in parts.items():
        inside = [n for n in families if any(n.startswith(p.strip("* ")) for p in part.split(","))]
        left = [n for n in inside if n not in gone]
        assert sum(rates[n] for n in left) == pytest.approx(weight if left else 0, rel=1e-12)


@pytest.mark.parametrize(
    ("hold_out", "message"),
    [
        ({"dataset": ["glue_qq"]}, r"'dataset'\]: 'glue_qq' fits no task .* mean 'glue_qqp'"),
        ({"family": ["qa"]}, r"Known: Natural Language Inference, paraphrase\."),
        ({"task": ["*"]}, "leaves no task"),
        ({"families": ["nli"]}, r"'families' is none of 'dataset', 'family', 'task'"),
        ({"family": "nli"}, r"must be a list of names, not 'nli'"),
    ],
)
def test_what_cannot_be_held_out(families, hold_out, message):
    with pytest.raises(UserError, match=message):
        build_mixture(MixtureConfig("m", families, hold_out=hold_out))


def test_each_family_is_left_out_in_turn(families):
    config = MixtureConfig("m", families, leave_one_out="family")
    # Data.mixture must say which.
    assert build_mixture(config) == build_mixture(config) == ""
    assert sorted(task_names("m")) == sorted(families)
    assert task_names("m_without_paraphrase") == ["cb_a", "other", "rte_a"]
    without = rates_of("m_without_natural_language_inference")
    assert without == {"mrpc_a": 40, "other": 7, "qqp_a": 100, "qqp_b": 100}
    made = leave_one_out("m", by="dataset")
    assert [name.removeprefix("m_without_") for name in made] == [
        *("cb", "glue_mrpc", "glue_qqp", "other", "rte"),
    ]
    assert task_names("m_without_glue_qqp") == ["cb_a", "mrpc_a", "other", "rte_a"]
    build_mixture(MixtureConfig("one", ["qqp_*", "other"]))
    with pytest.raises(UserError, match=r"are of 1 family, and two are needed"):
        leave_one_out("one")


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
        ({"maximum": {"a": 0}}, r"Mixture\.maximum\['a'\] must be positive or None, not 0"),
        ({"leave_one_out": "famly"}, r"'famly' is none of .* Did you mean 'family'"),
    ],
)
def test_options_of_other_rates_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        MixtureConfig("m", ["a"], **values)
