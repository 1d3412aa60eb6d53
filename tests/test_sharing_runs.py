"""Whole runs with parameters of tasks: training, resuming, evaluation, loading, conversion."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharing_plans as plans
from tiny_tasks import WORDS

import mtl_jax
from mtl_jax import build, cli, config, interop, objective, patterns, starting, train
from mtl_jax.checkpoint import Checkpointer
from mtl_jax.errors import UserError
from mtl_jax.evaluate import Evaluator
from mtl_jax.generate_config import GenerateConfig
from mtl_jax.interop.source import by_path, tensors
from mtl_jax.sharing import tree

pytestmark = pytest.mark.slow

STEPS = 6
TASKS = ("tiny_copy", "tiny_first", "tiny_reverse")
VALUES = {
    "Data.task_modules": "('tiny_tasks',)",
    "Data.mixture": "tiny",
    "Data.inputs_length": 16,
    "Data.targets_length": 12,
    "Data.batch_size": 24,
    "T5.vocab_size": 272,
    "T5.emb_dim": 16,
    "T5.num_heads": 2,
    "T5.head_dim": 8,
    "T5.mlp_dim": 16,
    "T5.num_encoder_layers": 2,
    "T5.num_decoder_layers": 2,
    "T5.dropout_rate": 0.1,
    "Optimizer.name": "adamw",
    "Optimizer.schedule": "constant",
    "Optimizer.learning_rate": 0.01,
    "Run.steps": STEPS,
    "Run.log_every": 1,
    "Checkpoint.every": 3,
    "Checkpoint.keep": 5,
    "Eval.tasks": "('tiny_copy', 'tiny_first')",
    "Eval.inputs_length": 16,
    "Eval.targets_length": 8,
    "Eval.max_decode_length": 4,
    "Eval.batch_size": 8,
}
SHARING = {
    "Sharing.levels": "(('decoder', 'task', 1, 2),)",
    "Sharing.copies": "(('encoder/encoder_norm/scale', 'cluster'),)",
    "Sharing.clusters": "{'tiny_first': 'words', '*': 'letters'}",
    "Sharing.soft_penalty": 0.01,
    "Lora.rank": 2,
    "Lora.owner": "inventory",
    "Lora.inventory": 3,
    "Prompt.length": 2,
    "Prompt.owners": "('shared', 'task')",
    "Prompt.combine": "concat",
    "Experts.number": 3,
    "Experts.stacks": "('encoder',)",
    "Experts.balance_weight": 0.01,
    "Adversary.weight": 0.1,
    "Adversary.exclude_prefix": 4,
}


def flags(directory, command="train", **changes):
    given = {name.replace("__", "."): value for name, value in changes.items()}
    values = VALUES | given | {"Run.directory": directory}
    return [command, *(f"--gin.{name}={value}" for name, value in values.items())]


def session_of(directory, **changes):
    given = flags(directory, **changes)[1:]
    return build.build(config.load([], [flag.removeprefix("--gin.") for flag in given]))


def as_flags(values):
    return {name.replace(".", "__"): value for name, value in values.items()}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _compile_cache_as_before():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with nearly every structure."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    assert cli.main(flags(directory, **as_flags(SHARING))) == 0
    return directory


@pytest.fixture(scope="module")
def apart(finished, tmp_path_factory):
    """The run after a step that moved what tasks own far enough for them to write other texts."""
    directory = tmp_path_factory.mktemp("runs") / "apart"
    shutil.copytree(finished, directory)
    session = build.build(config.load([str(finished / "config.gin")]))
    with Checkpointer(directory / "checkpoints") as checkpointer:
        state, position, meta = checkpointer.restore(STEPS, session.abstract_state)
        leaves = patterns.by_path(state.params)
        for number, path in enumerate(sorted(leaves)):
            if path.startswith("sharing/task/"):
                noise = np.random.RandomState(number).randn(*leaves[path].shape)
                leaves[path] = leaves[path] + 0.5 * noise.astype(np.float32)
        moved = dataclasses.replace(state, params=patterns.as_tree(leaves))
        checkpointer.save(STEPS + 1, moved, position, meta, wait=True)
    return directory


@pytest.fixture(scope="module")
def plain_of(apart):
    """(plan, task -> parameters), from the checkpoint by Orbax and `tree.plain`."""
    session = build.build(config.load([str(apart / "config.gin")]))
    with Checkpointer(apart / "checkpoints", read_only=True) as checkpointer:
        state, _, meta = checkpointer.restore(STEPS + 1, session.abstract_state)
    ids = meta["task_ids"]
    plan = session.sharing
    assert {name: plan.task_id(name) for name in TASKS} == ids
    plain = jax.jit(functools.partial(tree.plain, plan))
    return plan, lambda task: jax.device_get(plain(state.params, ids[task]))


@pytest.fixture(scope="module")
def exported(apart, tmp_path_factory):
    """The folder of the plain T5 of tiny_reverse, and this T5."""
    folder = tmp_path_factory.mktemp("exported") / "tiny_reverse"
    given = ["convert", str(apart), str(folder), "--to", "mtl_jax", "--task", "tiny_reverse"]
    assert not cli.main(given)
    return folder, mtl_jax.load(folder)


def test_a_run_learns_and_tells_what_is_shared(finished):
    rows = [row for row in lines(finished / "metrics.jsonl") if "loss" in row]
    assert len(rows) == STEPS
    assert rows[-1]["loss"] < rows[0]["loss"]
    for name in ("penalty", "adversary_loss", "adversary_accuracy", "adversary_strength"):
        assert all(np.isfinite(row[f"sharing/{name}"]) for row in rows), name
    np.testing.assert_allclose(rows[0]["sharing/adversary_strength"], 0.1, rtol=1e-6)
    assert (
        "sharing/task/layers_1_to_2/decoder/layers/mlp/wo/kernel"
        in (finished / "model-info.txt").read_text()
    )
    assert {row["task"] for row in lines(finished / "results.jsonl")} == {"tiny_copy", "tiny_first"}


@pytest.mark.slow
def test_a_run_continues_bit_by_bit(finished, tmp_path, capsys):
    directory = tmp_path / "broken"
    assert cli.main(flags(directory, **as_flags(SHARING), Run__steps=3)) == 0
    assert "Sharing: 3 tasks: " in capsys.readouterr().err
    assert cli.main(flags(directory, **as_flags(SHARING))) == 0
    whole, broken = (
        [row["loss"] for row in lines(folder / "metrics.jsonl") if "loss" in row]
        for folder in (finished, directory)
    )
    assert whole == broken
    session = session_of(directory, **as_flags(SHARING))
    states = []
    for folder in (finished, directory):
        with Checkpointer(folder / "checkpoints", read_only=True) as checkpointer:
            states.append(checkpointer.restore(STEPS, session.abstract_state)[0])
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_another_plan_is_refused(finished):
    changed = as_flags(SHARING) | {"Lora__rank": 4}
    with pytest.raises(UserError, match=r"has Lora\.rank = 2, this run 4"):
        session_of(finished, **changed).check_model(_meta(finished), "RUN")
    with pytest.raises(UserError, match="has parameters of tasks"):
        session_of(finished).check_model(_meta(finished), "RUN")
    # What is of training alone may change.
    changed = as_flags(SHARING) | {"Sharing__soft_penalty": 0.5, "Adversary__weight": 1.0}
    session_of(finished, **changed).check_model(_meta(finished), "RUN")


def _meta(directory):
    with Checkpointer(directory / "checkpoints", read_only=True) as checkpointer:
        return checkpointer.meta()


def test_a_source_gives_the_plain_t5_of_a_task(apart, plain_of):
    plan, plain = plain_of[0], plain_of[1]("tiny_copy")
    source = interop.open_source(apart, task="tiny_copy")
    assert source.config == plan.model_config
    assert tuple(source.prompt) == (268, 269, 270, 271)
    for path in tensors(source.config):
        layered = "layers" in path
        found = source.read(path, 1 if layered else None)
        expected = by_path(plain)[path]
        # One einsum or the other way to compile it.
        np.testing.assert_allclose(
            found, expected[1] if layered else expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("task", "message"),
    [(None, "say whose are meant"), ("tiny_cop", "Did you mean 'tiny_copy'")],
)
def test_a_task_must_be_named(finished, task, message):
    with pytest.raises(UserError, match=message):
        interop.open_source(finished, task=task)


def test_loading_converting_and_loading_again_give_the_same(apart, exported, tmp_path, capsys):
    texts, targets = ["abcab", "bab", "cabba", "bc"], ["ab", "ba", "ca", "bc"]
    how = GenerateConfig(max_length=4)
    folder, plain = exported
    loaded = mtl_jax.load(apart, task="tiny_reverse")
    other = mtl_jax.load(apart, task="tiny_copy")
    expected = loaded.score(texts, targets)
    np.testing.assert_allclose(plain.score(texts, targets), expected, rtol=1e-5)
    assert np.abs(expected - other.score(texts, targets)).max() > 1e-3
    written = [[x.tokens for (x,) in model.predict(texts, how)] for model in (plain, loaded, other)]
    assert written[0] == written[1]
    assert all(one != two for one, two in zip(*written[1:], strict=True))
    given = ["convert", str(apart), str(tmp_path / "hf"), "--to", "hf", "--task", "tiny_reverse"]
    assert not cli.main(given)
    # Its prompt is not said in Hugging Face's files.
    assert "put the token ids 268 to 271 in front" in capsys.readouterr().err
    source = interop.open_source(apart, task="tiny_reverse")
    again = [interop.open_source(place) for place in (folder, tmp_path / "hf")]
    for path in tensors(source.config):
        layer = 0 if "layers" in path else None
        for copy in again:
            np.testing.assert_array_equal(copy.read(path, layer), source.read(path, layer))
    with pytest.raises(UserError, match="no parameters of tasks"):
        mtl_jax.load(tmp_path / "hf", task="tiny_reverse")
    with pytest.raises(UserError, match="leave out the task 'tiny_reverse'"):
        mtl_jax.load(folder, task="tiny_reverse")


@pytest.mark.parametrize("mode", ["score", "generate"])
def test_infer_with_a_task(apart, exported, tmp_path, mode):
    """As the T5 that is exported for the task."""
    (tmp_path / "in.jsonl").write_text(
        "".join(f'{{"inputs": "{x}", "targets": "ab"}}\n' for x in ("abc", "cabba"))
    )
    given = ["infer", f"--checkpoint={apart}", f"--input={tmp_path / 'in.jsonl'}"]
    given += [f"--output={tmp_path / 'out.jsonl'}", f"--mode={mode}"]
    given += ["--gin.Generate.max_length=4"] * (mode == "generate")
    assert cli.main([*given, "--gin.Infer.task=tiny_reverse"]) == 0
    rows, texts = lines(tmp_path / "out.jsonl"), ["abc", "cabba"]
    if mode == "generate":
        expected = exported[1].generate(texts, max_length=4)
        assert [row["prediction"] for row in rows] == expected
        assert all(expected)
    else:
        expected = exported[1].score(texts, ["ab", "ab"])
        np.testing.assert_allclose([row["score"] for row in rows], expected, rtol=1e-5)


def test_evaluation_of_a_task_is_that_of_its_plain_t5(apart, plain_of, tmp_path):
    """What the evaluator with the plan writes of each task, and one without on its plain T5."""
    plan, plain = plain_of
    changed = [f"Eval.tasks={TASKS}"]
    session = build.build(config.load([str(apart / "config.gin")], changed))
    tasks = session.eval_tasks()
    params, _ = build.load_params(session, str(apart))
    for folder in ("found", "alone"):
        (tmp_path / folder).mkdir()
    session.evaluator().run(params, tasks, 0, tmp_path / "found")
    alone = Evaluator(plan.model_config, session.placement, session.config.eval)
    for task in tasks:
        for example in task.examples:
            example.inputs = [268, 269, 270, 271, *example.inputs]
    columns = {}
    for task in tasks:
        alone.run(plain(task.name), [task], 0, tmp_path / "alone")
        mine, own = (
            lines(tmp_path / folder / "predictions" / f"{task.name}.jsonl")
            for folder in ("found", "alone")
        )
        for one, other in zip(mine, own, strict=True):
            # Both are rounded to six places, after being made by two programs.
            np.testing.assert_allclose(one.pop("scores", 0), other.pop("scores", 0), rtol=1e-4)
            assert one == other
        columns[task.name] = [row["prediction"] for row in mine]
    # The same inputs; and what is equal above are texts.
    assert all(map(str.__ne__, columns["tiny_copy"], columns["tiny_reverse"]))


def test_tasks_that_are_not_in_the_batch_stay(tmp_path):
    """One block of one task in a batch: after a step only that task's entries have moved.

    Of copies and of LoRA, of parameters and of the optimizer's state.
    """
    changes = {
        "Sharing__levels": "(('decoder', 'task', 1, 2),)",
        "Lora__rank": 2,
        "Data__blocks": 1,
        "Optimizer__weight_decay": 0.1,
        "Run__steps": 3,
        "Checkpoint__every": 1,
        "Eval__tasks": "()",
    }
    assert cli.main(flags(tmp_path / "run", **changes)) == 0
    session = session_of(tmp_path / "run", **changes)
    states = [starting.start_state(session)]
    with Checkpointer(tmp_path / "run" / "checkpoints", read_only=True) as checkpointer:
        states += [checkpointer.restore(n, session.abstract_state)[0] for n in (1, 2, 3)]
    rows = [row for row in lines(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 3
    for before, after, row in zip(states, states[1:], rows, strict=False):
        present = [f"loss/{name}" in row for name in TASKS]  # ids are in this order
        assert sum(present) == 1
        found = plans.moved_entries(session.sharing, before, after)
        for (leaf, _), moved in found.items():
            # The A of LoRA gets no gradient, and its moments stay zero, where B is zero.
            if "/lora_a/" in leaf:
                assert not moved[~np.array(present)].any(), leaf
            else:
                np.testing.assert_array_equal(moved, present, err_msg=leaf)
        for kind in ("layers_1_to_2", "lora_a", "lora_b"):
            of_kind = [leaf.split("/")[0] for leaf, _ in found if f"/{kind}/" in leaf]
            assert set(of_kind) == {"params", "opt_state"}


def test_prompts_stand_in_front_of_every_packed_example(tmp_path):
    """In a batch of training; behind the prompt, the examples are those of the tasks."""
    changes = {"Data__inputs_length": 32, "Data__prefetch": 0}
    session = session_of(tmp_path / "run", **as_flags(SHARING), **changes)
    with train.open_stream(session, session.run.task_ids(TASKS)) as stream:
        arrays = next(stream).arrays
    texts = {(*(byte + 3 for byte in f"{x}{y}".encode()), 1) for x in WORDS for y in WORDS}
    packed = 0
    for tokens, segments in zip(
        arrays["encoder_input_tokens"], arrays["encoder_segment_ids"], strict=True
    ):
        packed += segments.max() > 1
        for segment in range(1, segments.max() + 1):
            mine = tuple(tokens[segments == segment].tolist())
            assert mine[:4] == (268, 269, 270, 271)
            assert mine[4:] in texts
    assert packed > 10


def test_sharing_starts_from_a_plain_checkpoint(tmp_path):
    assert cli.main(flags(tmp_path / "plain", Run__steps=2, Eval__tasks="()")) == 0
    changes = as_flags(SHARING) | {"Run__restore_from": str(tmp_path / "plain")}
    session = session_of(tmp_path / "shared", **changes)
    state = starting.start_state(session)
    base = interop.open_source(tmp_path / "plain")
    found = patterns.by_path(state.params)
    task_layer = found["sharing/task/layers_1_to_2/decoder/layers/self_attention/query/kernel"]
    expected = base.read(("decoder", "layers", "self_attention", "query", "kernel"), 1)
    for entry in range(3):
        np.testing.assert_array_equal(task_layer[entry, 0], expected)
    experts = found["sharing/experts/copies/encoder/layers/mlp/wi_0/kernel"]
    for expert in range(3):
        np.testing.assert_array_equal(
            experts[expert, 0], base.read(("encoder", "layers", "mlp", "wi_0", "kernel"), 0)
        )
    table = base.read(("token_embedder", "embedding"), None)
    rows = np.asarray(found["sharing/shared/prompt/embedding"])
    assert all(np.any(np.all(row[None] == table, axis=1)) for row in rows)
    assert int(state.step) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Prompt.length": 14}, r"set it to at least 273"),
        ({"T5.logits_via_embedding": True, "Prompt.length": 1}, r"T5\.logits_via_embedding"),
        (
            {"Adversary.weight": 1.0, "Balance.method": "PCGrad"},
            r"Adversary\.weight and PCGrad do not go together",
        ),
        (
            {
                "Sharing.levels": "(('decoder', 'task', 1, 2),)",
                "Balance.method": "PCGrad",
                "Balance.groups": "layer",
            },
            r"Balance\.groups = 'layer' needs all layers",
        ),
        ({"Lora.owner": "cluster"}, r"needs Lora\.rank"),
    ],
)
def test_what_does_not_go_together_is_told_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        session_of(tmp_path / "run", **as_flags(changes))
    assert not (tmp_path / "run").exists()


def test_microbatches_of_several_tasks_are_told():
    """By tasks, two of a row are too many; by clusters, two of one cluster are not."""
    ids = np.zeros((4, 3), np.int32)
    ids[0::2], ids[1::2, :2] = 2, 1  # microbatches take every second row
    mixed = ids.copy()
    mixed[2, 1] = 3

    def told(name, ids):
        shared = objective.Shared(plans.plan(name), jnp.int32(0))
        return bool(shared.mixed({"decoder_task_ids": ids}, 2))

    assert not told("lora", ids)
    assert told("lora", mixed)
    assert not told("lora_cluster", mixed)  # b and c are of one cluster
    mixed[2, 1] = 1
    assert told("lora_cluster", mixed)
    assert not told("lora_shared", mixed)


@pytest.mark.slow
def test_gradients_of_single_tasks_with_parameters_of_tasks(tmp_path):
    """PCGrad over layers of tasks: the gradients of what tasks own never conflict."""
    changes = {
        "Sharing__levels": "(('decoder', 'task', 1, 2),)",
        "Lora__rank": 2,
        "Balance__method": "PCGrad",
        "Run__steps": 2,
        "Eval__tasks": "()",
    }
    assert cli.main(flags(tmp_path / "run", **changes)) == 0
    rows = [row for row in lines(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert all(np.isfinite(row["loss"]) for row in rows)
