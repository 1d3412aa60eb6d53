"""Exemplars in front of inputs: which, how many, never the example itself; in-context training.

The witness of what is written is a re-statement in this file: it cuts the inputs at the separators
and looks the pieces up among the task's own examples.
"""

import uuid
from collections import Counter

import numpy as np
import pytest
import seqio

from mtl_jax import metrics, task_info
from mtl_jax.data import DataConfig, TrainStream
from mtl_jax.errors import UserError
from mtl_jax.eval_reading import load_eval_task
from mtl_jax.sources import RowsDataSource
from mtl_jax.tasks.few_shot import exemplars_used, few_shot_task, permuted
from mtl_jax.tasks.in_context import in_context_mixture, in_context_task
from mtl_jax.tasks.prompted import PromptedTask
from mtl_jax.tasks.prompts import Template

ROWS = {
    "train": [{"text": f"film {number} was seen", "label": number % 2} for number in range(20)],
    "validation": [{"text": f"film {n} was missed", "label": n % 2} for n in range(6)],
}
FEATURES = {
    side: seqio.Feature(seqio.ByteVocabulary(), add_eos=side == "targets")
    for side in ("inputs", "targets")
}
GOOD = Template("good", "{{text}}. Good? ||| {{answer_choices[label]}}", "yes ||| no")
OTHER = Template("other", "How is {{text}}? ||| {{answer_choices[label]}}", "fine ||| dull")


def tasks(templates=(GOOD,), rows=ROWS, **options):
    dataset = f"shots_{uuid.uuid4().hex[:8]}"
    options = {"splits": {split: len(found) for split, found in rows.items()}} | options
    given = {"metric_fns": [metrics.accuracy], "family": "films", "citation": "us"} | options
    return PromptedTask(dataset, rows.__getitem__, templates, FEATURES, **given).register()


def examples(name, split="validation", **options):
    source = seqio.TaskRegistry.get(name).source
    return list(source.examples(split, **({"shuffle": False} | options)))


def split_up(example, separator="\n\n"):
    """The exemplars of an example as (input, answer), and the input behind them."""
    *pieces, query = example["inputs"].split(separator)
    return [tuple(piece.rsplit("\n", 1)) for piece in pieces], query


def test_exemplars_are_examples_of_the_training_split():
    [name] = tasks()
    pool = {(e["inputs"], e["targets"]) for e in examples(name, "train")}
    plain = examples(name)
    new = few_shot_task(name, 3)
    assert new == f"{name}_3shot"
    drawn = Counter()
    for before, after in zip(plain, examples(new), strict=True):
        exemplars, query = split_up(after)
        assert query == after["query"] == before["inputs"]
        assert len(set(exemplars)) == after["exemplars"] == 3
        assert set(exemplars) <= pool
        assert after["demonstration"] == exemplars[0][1]
        assert [after[key] for key in ("targets", "answer_choices")] == [
            before[key] for key in ("targets", "answer_choices")
        ]
        drawn.update(exemplars)
    assert len(drawn) > 8  # 18 draws of 20: rows have exemplars of their own


def test_the_variant_is_described_and_evaluated_like_its_task():
    [name] = tasks(trained=False)
    new = few_shot_task(name, 2, max_tokens=200)
    about, own = task_info.info(new), task_info.info(name)
    assert about.shots == 2
    for field in ("dataset", "prompt", "family", "trained", "citation", "original", "language"):
        assert getattr(about, field) == getattr(own, field)
    loaded = load_eval_task(new, "validation", 200, 8)
    assert loaded.ranked
    assert loaded.metric_fns == seqio.TaskRegistry.get(name).predict_metric_fns
    assert loaded.examples[0].fields["exemplars"] == 2
    [of_seqio] = seqio.TaskRegistry.get(new).get_dataset(None, "validation", shuffle=False).take(1)
    assert of_seqio["inputs"].numpy().tolist() == loaded.examples[0].inputs


def test_a_row_never_sees_itself():
    """The only pool is the split itself, where two rows have the same text."""
    rows = {"test": [*ROWS["train"][:4], ROWS["train"][0]]}
    [name] = tasks(rows=rows)
    for example in examples(few_shot_task(name, 3), "test"):
        exemplars, query = split_up(example)
        assert query not in [text for text, _ in exemplars]
    new = few_shot_task(name, 4)  # rows 0 and 4 have but three others
    with pytest.raises(UserError, match=r"test row 0: .* has 3 other examples, too few for 4"):
        examples(new, "test")


@pytest.mark.parametrize(
    ("splits", "split", "asked", "pool"),
    [
        ("train dev test", "test", "train", "train"),
        ("test dev", "test", "train", "dev"),
        ("test validation dev", "validation", "train", "dev"),
        ("validation test", "test", "train", "validation"),
        ("train dev test", "train", "other", "dev"),
        ("dev test", "test", "test", "test"),  # asked for
        ("validation test", "validation", "train", "validation"),
        ("test", "test", "train", "test"),
    ],
)
def test_the_evaluated_split_is_the_last_to_give_exemplars(splits, split, asked, pool, caplog):
    rows = {
        name: [{"text": f"{name} {n}", "label": 0} for n in range(4)] for name in splits.split()
    }
    [name] = tasks(rows=rows)
    for example in examples(few_shot_task(name, 2, pool_split=asked), split):
        exemplars, query = split_up(example)
        assert all(text.startswith(f"{pool} ") and text != query for text, _ in exemplars)
    warned = f"Task {name} has none of the splits" in caplog.text
    assert warned == (pool == split != asked)


def test_draws_depend_on_nothing_but_seed_data_set_split_and_row():
    good, other = tasks([GOOD, OTHER])
    new = few_shot_task(good, 2)
    assert few_shot_task(good, 2) == new
    whole = examples(new)
    by_query = {e["query"]: e for e in whole}
    for index in range(3):
        for example in examples(new, shuffle=True, seed=7, shard_info=seqio.ShardInfo(index, 3)):
            assert example == by_query[example["query"]]
    # More shots go on where fewer end; another prompt has the same rows; another seed others.
    films = lambda name: [[x[0].split()[1] for x in split_up(e)[0]] for e in examples(name)]  # noqa: E731
    films_of_other = [
        [text.split()[3] for text, _ in split_up(e)[0]] for e in examples(few_shot_task(other, 2))
    ]
    assert films(new) == films_of_other
    assert [found[:2] for found in films(few_shot_task(good, 4))] == films(new)
    reseeded = few_shot_task(good, 2, seed=1)
    assert reseeded == f"{good}_2shot_seed1"
    assert films(reseeded) != films(new)


def test_rows_that_the_prompt_skips_are_no_exemplars_and_have_none():
    some = Template("some", "{% if label %}{{text}}. Good? ||| no{% endif %}")
    [name] = tasks([some])
    found = examples(few_shot_task(name, 9))
    assert len(found) == 3
    assert seqio.TaskRegistry.get(f"{name}_9shot").source.skipped("validation") == 3
    assert all(answer == "no" for e in found for _, answer in split_up(e)[0])


@pytest.mark.parametrize("room", [400, 120, 90, 61, 33, 5])
def test_exemplars_that_do_not_fit_are_left_out_from_the_last(room):
    """With a vocabulary of bytes the tokens are the bytes, and one is kept for the end."""
    rows = ROWS | {"train": [{**r, "text": "x" * 3 * i} for i, r in enumerate(ROWS["train"])]}
    [name] = tasks(rows=rows)
    free, short = few_shot_task(name, 6), few_shot_task(name, 6, max_tokens=room)
    assert short == f"{name}_6shot_max{room}"
    counts = Counter()
    for whole, cut in zip(examples(free), examples(short), strict=True):
        pieces = whole["inputs"].split("\n\n")
        fitting = [
            count for count in range(7)
            if len("\n\n".join([*pieces[:count], pieces[-1]]).encode()) + 1 <= room
        ]  # fmt: skip
        expected = max(fitting, default=0)
        assert cut["exemplars"] == expected
        assert cut["inputs"] == "\n\n".join([*pieces[:expected], pieces[-1]])
        assert bool(cut["demonstration"]) == bool(expected)
        counts[expected] += 1
    assert exemplars_used(short, "validation") == dict(sorted(counts.items()))


def test_balanced_exemplars_go_through_the_choices():
    rows = ROWS | {"train": [{**row, "label": int(i < 17)} for i, row in enumerate(ROWS["train"])]}
    [name] = tasks(rows=rows)
    firsts = set()
    for example in examples(few_shot_task(name, 4, balanced=True)):
        answers = [answer for _, answer in split_up(example)[0]]
        assert Counter(answers) == {"yes": 2, "no": 2}
        assert answers[:2] == answers[2:]
        firsts.add(answers[0])
    assert firsts == {"yes", "no"}
    with pytest.raises(UserError, match="too few other examples with the answer 'yes' for 8"):
        examples(few_shot_task(name, 8, balanced=True))
    [generated] = tasks([Template("free", "{{text}}. Good? ||| a")])
    with pytest.raises(UserError, match="no answer choices, so its exemplars cannot be balanced"):
        examples(few_shot_task(generated, 2, balanced=True))


def test_fixed_exemplars_are_the_same_for_all_rows():
    [name] = tasks()
    new = few_shot_task(name, 3, fixed=True, separator=" ## ")
    assert new.startswith(f"{name}_3shot_separator")
    assert len({tuple(split_up(e, " ## ")[0]) for e in examples(new)}) == 1


class Plain(RowsDataSource):
    """Rows that have texts already, or numbers."""

    def __init__(self, rows):
        super().__init__(("train",))
        self._rows = rows

    def rows(self, split):
        return self._rows


def add_plain(rows, *before):
    name = f"plain_{uuid.uuid4().hex[:8]}"
    steps = [*before, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    seqio.TaskRegistry.add(name, Plain(rows), preprocessors=steps, output_features=FEATURES)
    return name


def test_any_task_with_texts_has_exemplars():
    """Rows as they are, and texts that TensorFlow preprocessors make of rows."""
    texts = [{"inputs": f"in {n}", "targets": f"out {n}", "note": n} for n in range(5)]
    rekey = seqio.preprocessors.rekey
    numbers = [{"x": row["inputs"], "y": row["targets"]} for row in texts]
    names = [
        add_plain(texts),
        add_plain(numbers, lambda ds: rekey(ds, {"inputs": "x", "targets": "y"})),
    ]
    for name in names:
        for number, example in enumerate(examples(few_shot_task(name, 2), "train")):
            exemplars, query = split_up(example)
            assert query == f"in {number}"
            assert all(text.replace("in", "out") == answer for text, answer in exemplars)
    assert [e["note"] for e in examples(f"{names[0]}_2shot", "train")] == list(range(5))
    with pytest.raises(UserError, match="no texts inputs and targets"):
        examples(few_shot_task(add_plain([{"inputs": 1, "targets": 2}]), 1), "train")


def test_no_shots_are_the_task_itself_and_mistakes_are_told():
    [name] = tasks()
    assert few_shot_task(name, 0) == name
    for arguments, message in [
        ((name + "x", 1), f"Did you mean '{name}'"),
        ((name, -1), "at least 0, not -1"),
        ((few_shot_task(name, 1), 1), "has exemplars already"),
    ]:
        with pytest.raises(UserError, match=message):
            few_shot_task(*arguments)
    with pytest.raises(UserError, match="max_tokens of shots must be at least 1"):
        few_shot_task(name, 1, max_tokens=0)
    with pytest.raises(UserError, match="no exemplars to count"):
        exemplars_used(name, "validation")


def test_lazy_permutations_are_uniform():
    """All 24 orders of four, 2,400 times: chi-squared is below its 0.999 quantile (49.7, 23 df)."""
    rng = np.random.default_rng(0)
    counts = Counter(tuple(permuted(rng, 4)) for _ in range(2400))
    assert len(counts) == 24
    assert all(sorted(order) == [0, 1, 2, 3] for order in counts)
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 49.7


# ---------------------------------------------------------------------------------------------
# In-context training
# ---------------------------------------------------------------------------------------------


def test_in_context_exemplars_are_drawn_anew_in_each_epoch():
    [name] = tasks()
    new = in_context_task(name, 4)
    assert new == f"{name}_in_context_4shot"
    epochs = [{e["query"]: e for e in examples(new, "train", shuffle=True, seed=s)} for s in (1, 2)]
    again = examples(new, "train", shuffle=True, seed=1, shard_info=seqio.ShardInfo(1, 2))
    assert all(example == epochs[0][example["query"]] for example in again)
    assert len(again) == 10
    changed = 0
    for query, example in epochs[0].items():
        exemplars, last = split_up(example, "\n\n\n")
        assert last == query
        assert len(exemplars) == 4
        assert query not in [text for text, _ in exemplars]
        changed += exemplars != split_up(epochs[1][query], "\n\n\n")[0]
    assert changed >= 19  # the same four of 19 in the same order: one of 93,024


def test_channel_gives_answers_and_asks_for_inputs():
    """MetaICL's channel model: y1 x1 ... y -> x."""
    [name] = tasks()
    new = in_context_task(name, 2, channel=True, max_tokens=None)
    assert new.startswith(f"{name}_channel_2shot")
    pool = {e["inputs"]: e["targets"] for e in examples(name, "train")}
    for example in examples(new, "train"):
        *pieces, answer = example["inputs"].split("\n\n\n")
        assert pool[example["targets"]] == answer
        for piece in pieces:
            given, text = piece.split("\n")
            assert pool[text] == given
            assert text != example["targets"]
        assert example["answer_choices"] == ""


def test_the_training_stream_reads_in_context_tasks_and_resumes():
    names = tasks([GOOD, OTHER])
    base, mixture = (f"mixture_{uuid.uuid4().hex[:8]}" for _ in range(2))
    seqio.MixtureRegistry.add(base, [(names[0], 1.0), (names[1], 3.0)])
    in_context_mixture(mixture, base, 2)
    rates = seqio.MixtureRegistry.get(mixture).rate_per_task_name
    assert rates == {f"{names[0]}_in_context_2shot": 1.0, f"{names[1]}_in_context_2shot": 3.0}
    config = DataConfig(
        mixture=mixture, inputs_length=160, targets_length=8, batch_size=4, num_shards=2
    )
    ids = {name: number for number, name in enumerate(sorted(rates), 1)}
    with TrainStream(config, ids) as stream:
        batches = [next(stream) for _ in range(12)]  # several epochs of 20 rows
    with TrainStream(config, ids) as stream:
        stream.restore(batches[7].state)
        for expected in batches[8:]:
            found = next(stream)
            for key, array in expected.arrays.items():
                np.testing.assert_array_equal(found.arrays[key], array)
        counts = stream.counters_by_task(batches[-1])
    assert sum(of_task["examples"] for of_task in counts.values()) > 40


def test_mistakes_in_context():
    [name] = tasks(rows={"test": ROWS["validation"]})
    with pytest.raises(UserError, match="no split 'train'; it has test"):
        in_context_task(name, 2)
    with pytest.raises(UserError, match="at least one exemplar"):
        in_context_task(name, 0)
    with pytest.raises(UserError, match="registered already"):
        in_context_mixture(name, name)


# ---------------------------------------------------------------------------------------------
# The data folder
# ---------------------------------------------------------------------------------------------


@pytest.mark.data
def test_shots_of_real_prompts(data_folder):
    """CB's and COPA's validation rows get exemplars of the training sets within 512 tokens."""
    del data_folder
    import mtl_jax.tasks.super_glue  # noqa: F401 (registers)

    for name in ("super_glue_cb_can_we_infer", "super_glue_copa_why_c1_or_c2"):
        new = few_shot_task(name, 4, max_tokens=512)
        loaded = load_eval_task(new, "validation", 512, 128)
        pool = {(e["inputs"], e["targets"]) for e in examples(name, "train")}
        plain = examples(name)
        assert len(loaded.examples) == len(plain)
        used = Counter()
        for before, after in zip(plain, loaded.examples, strict=True):
            start, query = after.inputs_text[: -len(before["inputs"])], before["inputs"]
            assert after.inputs_text == start + query
            assert (after.targets_text, loaded.truncated) == (before["targets"], 0)
            exemplars = [e for e in pool if "\n".join(e) + "\n\n" in start]
            assert len(exemplars) >= after.fields["exemplars"]
            used[after.fields["exemplars"]] += 1
        assert used[4] > 0
        assert exemplars_used(new, "validation") == dict(sorted(used.items()))
