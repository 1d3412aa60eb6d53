"""The Evaluator: which answer wins, results free of batching, files and baselines."""

import functools
import json
import logging

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import buckets, decode, metrics
from mtl_jax.errors import UserError
from mtl_jax.evaluate import EvalConfig, EvalExample, EvalTask, Evaluator, Placement
from mtl_jax.results import baselines
from mtl_jax.task_info import TaskInfo


@functools.cache
def _model():
    cfg = golden.config("1.1")
    return cfg, golden.params(cfg)


def _text(tokens):
    return " ".join(map(str, tokens))


def _example(index, inputs, targets, choices=()):
    return EvalExample(
        index=index,
        inputs=list(inputs),
        targets=[*targets, 1],
        inputs_text=_text(inputs),
        targets_text=_text(targets),
        choices=[_text(choice) for choice in choices],
        choice_tokens=[[*choice, 1] for choice in choices],
    )


def _task(name, examples, **changes):
    values = {
        "info": TaskInfo(name, dataset=name.split("_")[0], prompt=name, family="test"),
        "split": "validation",
        "metric_fns": [metrics.accuracy],
        "score_metric_fns": [],
        "postprocess": None,
        "detokenize": _text,
    }
    return EvalTask(name=name, examples=examples, **(values | changes))


def _ranked_task(name="rank_a", seed=0, count=11):
    rng = np.random.default_rng(seed)
    tokens = lambda n: [int(t) for t in rng.integers(2, 32, n)]  # noqa: E731
    examples = []
    for index in range(count):
        choices = [tokens(rng.integers(1, 4)) for _ in range(rng.integers(2, 5))]
        target = choices[rng.integers(len(choices))]
        examples.append(_example(index, tokens(rng.integers(2, 12)), target, choices))
    return _task(name, examples)


@functools.cache
def _evaluator(batch_size=4, max_shapes=1):
    config = EvalConfig(batch_size=batch_size, max_shapes=max_shapes, max_decode_length=6)
    return Evaluator(_model()[0], None, config)


def _run(tasks, run_dir=None, step=7, **config):
    if run_dir is not None:
        run_dir.mkdir(exist_ok=True)
    with jax.default_matmul_precision("highest"):
        return _evaluator(**config).run(_model()[1], tasks, step, run_dir)


def _read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ranking_gives_the_choice_that_scores_best_alone(tmp_path):
    task, (cfg, params) = _ranked_task(), _model()
    rows = _run([task], tmp_path)
    records = _read(tmp_path / "predictions" / "rank_a.jsonl")

    @jax.jit
    def score(inputs, *packed):
        segments = (inputs > 0).astype(jnp.int32)
        return decode.score_choices(cfg, params, inputs, segments, *packed, num_choices=1)

    correct = []
    for example, record in zip(task.examples, records, strict=True):
        count = len(example.choices)
        inputs = buckets.pad_rows([example.inputs] * count, 4, 12)
        with jax.default_matmul_precision("highest"):
            packed = decode.pack_choices([[choice] for choice in example.choice_tokens], 4, 4)
            alone, lengths, _ = (column[:, 0] for column in score(inputs, *packed))
        np.testing.assert_allclose(record["scores"], alone[:count], atol=1e-5)
        assert record["n_tokens"] == lengths[:count].tolist()
        assert record["chosen"] == int(np.argmax(alone[:count]))
        assert record["prediction"] == example.choices[record["chosen"]]
        assert record["correct"] == (record["prediction"] == example.targets_text)
        correct.append(record["correct"])
    assert 0 < sum(correct) < len(correct)
    by_metric = {row["metric"]: row for row in rows}
    assert by_metric["accuracy"]["value"] == pytest.approx(100 * np.mean(correct))
    assert by_metric["accuracy"]["n"] == 11
    assert set(by_metric) == {"accuracy", "chance", "majority"}


def test_results_do_not_depend_on_batches_buckets_or_company(tmp_path):
    task, other = _ranked_task(), _ranked_task("rank_b", seed=1, count=9)
    reference = _run([task], tmp_path / "0", batch_size=1)
    expected = _read(tmp_path / "0" / "predictions" / "rank_a.jsonl")
    for i, (batch_size, max_shapes, tasks) in enumerate(
        [(4, 3, [other, task]), (64, 1, [task, other])], 1
    ):
        rows = _run(tasks, tmp_path / str(i), batch_size=batch_size, max_shapes=max_shapes)
        assert [row for row in rows if row["task"] == "rank_a"] == reference
        records = _read(tmp_path / str(i) / "predictions" / "rank_a.jsonl")
        for record, other_record in zip(records, expected, strict=True):
            np.testing.assert_allclose(record["scores"], other_record["scores"], atol=1e-5)
            assert record | {"scores": 0} == other_record | {"scores": 0}


def test_predictions_do_not_depend_on_the_order_of_the_choices(tmp_path):
    task = _ranked_task()
    _run([task], tmp_path / "a")
    for example in task.examples:
        example.choices.reverse()
        example.choice_tokens.reverse()
    _run([task], tmp_path / "b")
    a, b = (_read(tmp_path / name / "predictions" / "rank_a.jsonl") for name in "ab")
    assert [r["prediction"] for r in a] == [r["prediction"] for r in b]
    assert [r["chosen"] for r in a] != [r["chosen"] for r in b]


def test_generation_gives_the_golden_tokens_and_metrics(tmp_path):
    inputs = [[int(t) for t in row if t] for row in golden.ENCODER]
    # The golden greedy outputs of rows 1 and 2 (notes on T5X, 4b), cut at 6 tokens.
    examples = [_example(0, inputs[0], [10, 9]), _example(5, inputs[1], [20, 9, 26, 6, 9])]
    rows = _run([_task("generate_a", examples, metric_fns=[metrics.accuracy])], tmp_path)
    records = _read(tmp_path / "predictions" / "generate_a.jsonl")
    assert [(r["index"], r["prediction"]) for r in records] == [
        (0, "10 9"),
        (5, "2 20 9 26 6 9"),
    ]
    assert rows == [
        {
            "task": "generate_a",
            "dataset": "generate",
            "prompt": "generate_a",
            "family": "test",
            "trained": True,
            "original": True,
            "language": "",
            "split": "validation",
            "step": 7,
            "metric": "accuracy",
            "value": 50.0,
            "n": 2,
            "truncated": 0,
        }
    ]


def test_each_task_ends_with_its_own_end_of_sequence(tmp_path):
    """The golden rows say 10 9 1 and 2 20 9 26 6 9 26 6 (notes on T5X, 4b), here cut at 6."""
    first, second = ([int(t) for t in row if t] for row in golden.ENCODER[:2])
    examples = [_example(0, first, [3]), _example(1, second, [3])]
    ends = (1, 2, 9, -1)
    compiled = _evaluator().compiled_shapes
    _run([_task(f"eos_{eos}", examples, eos_id=eos) for eos in ends], tmp_path)
    assert _evaluator().compiled_shapes <= compiled + 1
    said = {
        eos: [r["prediction"] for r in _read(tmp_path / "predictions" / f"eos_{eos}.jsonl")]
        for eos in ends
    }
    assert said[1] == ["10 9", "2 20 9 26 6 9"]
    assert said[9] == ["10", "2 20"]
    # Where 1 ends nothing it is a word like any other, and the row goes on.
    assert said[2][0].startswith("10 9 1 ")
    assert said[2][1] == ""
    assert said[-1] == [said[2][0], said[1][1]]


def test_score_metrics_get_the_golden_log_likelihoods():
    inputs = [[int(t) for t in row if t] for row in golden.ENCODER]
    targets = [[int(t) for t in row if t > 1] for row in golden.TARGETS]
    examples = [_example(i, *pair) for i, pair in enumerate(zip(inputs, targets, strict=True))]
    seen = []

    def fn(targets, scores):
        seen.append((targets, scores))
        return {"log_likelihood": np.mean(scores)}

    rows = _run([_task("score_a", examples, metric_fns=[], score_metric_fns=[fn])])
    assert seen[0][0] == [_text(target) for target in targets]
    np.testing.assert_allclose(seen[0][1], [-25.00817, -16.36047, -9.46516], atol=2e-5)
    assert [row["metric"] for row in rows] == ["log_likelihood"]


def test_shapes_are_compiled_once_for_all_tasks_and_evaluations():
    tasks = [_ranked_task(f"rank_{i}", seed=i, count=5) for i in range(6)]
    cfg, params = _model()
    evaluator = Evaluator(cfg, None, EvalConfig(batch_size=8, max_shapes=2))
    first = evaluator.run(params, tasks, 1, None)
    assert 1 <= evaluator.compiled_shapes <= 2
    compiled = evaluator.compiled_shapes
    again = evaluator.run(params, tasks, 2, None)
    assert evaluator.compiled_shapes == compiled
    assert [row | {"step": 1} for row in again] == first


def test_sharded_rows_give_the_same_scores(tmp_path):
    cfg, params = _model()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placement = Placement(
        put=lambda tree: jax.device_put(tree, rows), replicated=everywhere, row_multiple=8
    )
    task = _ranked_task()
    alone = _run([task], tmp_path / "alone")
    evaluator = Evaluator(cfg, placement, EvalConfig(batch_size=8, max_shapes=1))
    with jax.default_matmul_precision("highest"):
        sharded_params = jax.device_put(params, everywhere)
        (tmp_path / "sharded").mkdir()
        sharded = evaluator.run(sharded_params, [task], 7, tmp_path / "sharded")
    assert sharded == alone
    a, b = (_read(tmp_path / n / "predictions" / "rank_a.jsonl") for n in ("alone", "sharded"))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x["scores"], y["scores"], atol=1e-5)
    with pytest.raises(UserError, match=r"Eval\.batch_size = 12 must be a multiple of the 8"):
        Evaluator(cfg, placement, EvalConfig(batch_size=12))


def test_results_are_appended_and_predictions_replaced(tmp_path):
    examples = [_example(i, [9], [3], [[3], [4]]) for i in range(3)]
    task = _task("rank_a", examples)
    first = _run([task], tmp_path, step=1)
    second = _run([task], tmp_path, step=2)
    assert _read(tmp_path / "results.jsonl") == first + second
    records = _read(tmp_path / "predictions" / "rank_a.jsonl")
    assert [r["step"] for r in records] == [2, 2, 2]
    assert [p.name for p in (tmp_path / "predictions").iterdir()] == ["rank_a.jsonl"]


def test_postprocessing_is_applied_to_both_sides():
    def odd_or_even(text, example, is_target):
        assert example == {"kept": 1}
        return int(text) % 2 if is_target else 0

    examples = [_example(i, [9], [3 + i % 2], [[3], [4]]) for i in range(3)]
    for example in examples:
        example.fields = {"kept": 1}
    rows = _run([_task("post_a", examples, postprocess=odd_or_even)])
    assert rows[0]["value"] == pytest.approx(100 / 3)  # targets 1, 0, 1 against 0, 0, 0


def test_baselines():
    two, three = [[3], [4]], [[3], [4], [5]]
    examples = [
        _example(0, [9], [4], two),
        _example(1, [9], [4], three),
        _example(2, [9], [3], three),
        _example(3, [9], [8], two),  # the target is not among the choices
    ]
    # chance: (1/2 + 1/3 + 1/3 + 0) / 4; the right answer stands second most often, twice of four
    assert baselines(examples) == pytest.approx({"chance": 100 * 7 / 24, "majority": 50.0})


def test_warns_about_cut_examples_and_lost_targets(caplog):
    examples = [_example(i, [9], [8], [[3], [4]]) for i in range(3)]
    with caplog.at_level(logging.WARNING):
        _run([_task("warn_a", examples, truncated=2)])
    assert "warn_a: 2 of 3 examples (66.7 %) were cut" in caplog.text
    assert "in 3 of 3 examples the target is not among the choices" in caplog.text
    caplog.clear()
    _run([_task("warn_b", [_example(i, [9], [3], [[3], [4]]) for i in range(3)])])
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "'bad_a' has no examples in split 'validation'"),
        (
            [_example(0, [9], [3], [[3], [4]]), _example(6, [9], [3])],
            "'bad_a', validation example 6 has no answer choices but other examples have",
        ),
    ],
)
def test_unfit_tasks_are_user_errors(examples, message):
    with pytest.raises(UserError, match=message):
        _run([_task("bad_a", examples)])


def test_a_choice_without_tokens_is_a_user_error():
    example = _example(4, [9], [3], [[3], [4]])
    example.choice_tokens[1] = []
    with pytest.raises(UserError, match="example 4: an answer choice without tokens"):
        _run([_task("bad_b", [example])])


def test_config_refuses_impossible_values():
    with pytest.raises(UserError, match=r"Eval\.batch_size must be at least 1, got 0"):
        EvalConfig(batch_size=0)
    with pytest.raises(UserError, match=r"Eval\.limit must be at least 0, got -1"):
        EvalConfig(limit=-1)


@pytest.mark.parametrize(
    ("tokens", "form", "expected", "cut"),
    [
        ([5, 6, 7], {}, [5, 6, 7], False),
        ([5, 6, 7, 8, 9], {}, [5, 6, 7, 8], True),
        ([5, 6, 7, 1], {}, [5, 6, 7, 1], False),
        # As SeqIO trims: the end of sequence is cut off like any token.
        ([5, 6, 7, 8, 1], {}, [5, 6, 7, 8], True),
        ([5, 6, 7], {"eos": True}, [5, 6, 7, 1], False),
        ([5, 6, 7, 1], {"eos": True}, [5, 6, 7, 1], False),
        ([5, 6, 7, 8], {"eos": True}, [5, 6, 7, 1], True),
        ([5, 6, 7, 8, 1], {"eos": True, "truncate": "left"}, [6, 7, 8, 1], True),
        ([5, 6, 7, 8, 9], {"truncate": "left"}, [6, 7, 8, 9], True),
        ([5, 6, 7, 1], {"eos": False}, [5, 6, 7], False),
        ([5, 6, 7, 8, 9], {"null": True}, [1], False),
    ],
)
def test_inputs_are_asked_in_the_form_of_a_pass(tokens, form, expected, cut):
    asked, is_cut = _task("asked", []).asked(tokens, 4, **form)
    assert (asked.tolist(), bool(is_cut)) == (expected, cut)
    # Where the task's own trimming keeps the end of sequence, so does this.
    kept, _ = _task("asked", [], eos_after_trim=True).asked([5, 6, 7, 8, 1], 4)
    assert kept.tolist() == [5, 6, 7, 1]


def test_an_end_of_sequence_that_the_vocabulary_has_not_is_a_user_error():
    with pytest.raises(UserError, match="'asked': the vocabulary of its inputs has no end"):
        _task("asked", [], inputs_eos_id=-1).asked([5, 6], 4, eos=True)
