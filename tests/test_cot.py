"""Flan's chain-of-thought sets and T0's published sizes, from the data folder."""

import importlib

import pytest

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def modules(data_folder):
    return [importlib.import_module(f"mtl_jax.tasks.{name}") for name in ("cot", "t0")]


def test_reasons_stand_before_the_answer(modules):
    from mtl_jax.mixtures import mixture_table, provider
    from mtl_jax.reading import Epoch, TaskReader

    rows = {row.task: row for row in mixture_table("cot_train")}
    assert sum(row.examples for row in rows.values()) == 33_335  # README of the data folder
    assert rows["cot_gsm8k"].share == pytest.approx(7473 / 33_335)
    assert rows["cot_gsm8k"].dataset == "gsm8k"  # so that the guard knows its test set
    reader = TaskReader(provider("cot_gsm8k"), {"inputs": 512, "targets": 128})
    first = next(reader.examples(Epoch("train", shuffle=False, seed=0)))
    assert first["inputs_pretokenized"].startswith("Natalia sold clips to 48 of her friends")
    assert first["targets_pretokenized"] == (
        "Natalia sold 48 / 2 = 24 clips in May. Natalia sold 48 + 24 = 72 clips altogether in "
        "April and May. So the answer is 72."
    )
    assert first["inputs"][-1] == first["targets"][-1] == 1


def test_the_answer_is_what_follows(modules):
    answer = modules[0].final_answer
    assert answer("Half is 3. So the answer is 3.5.") == "3.5"
    assert answer("First the answer is no.\nBut: So The Answer Is: (B)", is_target=True) == "(B)"
    assert answer("no idea") == ""


def test_t0_at_its_published_sizes(modules):
    """QQP has 363,846 rows, below the cap: each prompt counts whole. Yelp's 650,000 are above."""
    from mtl_jax.mixtures import mixture_table

    literal, together = ({row.task: row for row in mixture_table(m)} for m in modules[1].MIXTURES)
    assert len(literal) == 251
    qqp = [row.rate for row in literal.values() if row.dataset == "glue_qqp"]
    assert qqp == [363_846.0] * len(qqp)
    yelp = [row.rate for row in literal.values() if row.dataset == "yelp_review_full"]
    assert yelp == [500_000 // len(yelp)] * len(yelp)
    capped = [row.rate for row in together.values() if row.dataset == "glue_qqp"]
    assert sum(capped) == pytest.approx(500_000)
    small = {d: r for d, r in modules[1].train_sizes().items() if d == "glue_mrpc"}
    assert small == {"glue_mrpc": 3668}
