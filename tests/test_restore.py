"""Starting from a checkpoint by parts, and continuing runs with frozen parameters."""

import dataclasses
import functools
import json

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import (
    build,
    checkpoint_fit,
    config,
    model,
    objective,
    optim,
    patterns,
    restore,
    starting,
    step,
)
from mtl_jax.checkpoint import Checkpointer
from mtl_jax.errors import UserError
from mtl_jax.run_config import RunConfig

MODEL = {
    **{"vocab_size": 64, "emb_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 32},
    **{"num_encoder_layers": 2, "num_decoder_layers": 2},
}
STEP = 7


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What `mtl-jax convert` leaves: a checkpoint with parameters alone; (its folder, they)."""
    folder = tmp_path_factory.mktemp("source")
    cfg = model.T5Config(**MODEL)
    params = jax.jit(functools.partial(model.init, cfg))(jax.random.key(1))
    with Checkpointer(folder / "checkpoints") as checkpointer:
        meta = {"model": dataclasses.asdict(cfg), "task_ids": {}}
        checkpointer.save(STEP, {"params": params}, {}, meta)
    return folder, jax.device_get(patterns.by_path(params))


def opened(directory, source, changes=None, values=(), **run):
    """The session of a run that starts from `source`, on a mesh of 4 x 2 devices."""
    run = {"directory": str(directory / "run"), "restore_from": str(source), **run}
    values = [
        *values,
        *(f"T5.{name}={value!r}" for name, value in (MODEL | (changes or {})).items()),
        *(f"Run.{name}={value!r}" for name, value in run.items()),
        *("Mesh.data=1", "Mesh.fsdp=4", "Mesh.tensor=2", "Run.compile_cache=False"),
    ]
    return build.build(config.load([], values))


def started(session):
    """Its first state: (parameters by path, state)."""
    state = starting.start_state(session)
    assert jax.tree.map(lambda x: x.sharding, state) == session.shardings
    assert jax.tree.structure(state) == jax.tree.structure(session.abstract_state)
    return jax.device_get(patterns.by_path(state.params)), state


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_parameters_alone_start_a_run_with_a_fresh_optimizer(source, tmp_path, capsys):
    folder, params = source
    for place in (folder, folder / "checkpoints", folder / "checkpoints" / str(STEP)):
        found, state = started(opened(tmp_path, place))
        assert_same(found, params)
        assert state.step == 0
        assert f"Restored the parameters from {place} at step {STEP}" in capsys.readouterr().err


def test_a_whole_state_is_asked_of_parameters_alone(source, tmp_path):
    session = opened(tmp_path, source[0], restore_optimizer="keep")
    with pytest.raises(UserError, match=r"holds parameters but no optimizer state.*= 'drop'"):
        starting.start_state(session)


def test_a_parameter_that_is_missing_is_told_apart_from_a_missing_optimizer(source, tmp_path):
    state = opened(tmp_path, source[0]).abstract_state
    more = state.params | {"bias": state.step}
    with Checkpointer(source[0] / "checkpoints", read_only=True) as checkpointer:
        for restored in (
            lambda: checkpointer.restore_parameters(None, more),
            lambda: checkpointer.restore_parameters(None, {"bias": state.step}, some=True),
            lambda: checkpointer.restore(None, dataclasses.replace(state, params=more)),
        ):
            with pytest.raises(
                UserError, match=r"does not fit this run's model.* lacks .*params/bias"
            ):
                restored()


def test_a_map_moves_leaves_fresh_and_takes_the_rest(source, tmp_path, capsys):
    folder, params = source
    pairs = [
        (r"decoder/layers/mlp/(.*)", r"encoder/layers/mlp/\1"),
        (
            r"decoder/layers/(self_attention|encoder_decoder_attention)/(.*)",
            r"encoder/layers/attention/\2",
        ),
        ("decoder/.*", ""),
    ]
    session = opened(tmp_path, folder, restore_map=pairs)
    read = []
    with pytest.MonkeyPatch.context() as patch:
        original = Checkpointer._read

        def spied(self, number, abstract):
            read.extend(checkpoint_fit.tensors(abstract))
            return original(self, number, abstract)

        patch.setattr(Checkpointer, "_read", spied)
        found, state = started(session)
    fresh = jax.device_get(patterns.by_path(session.fresh_state().params))
    expected = {}
    for path in params:
        part = path.split("/")
        if path.startswith("decoder/layers/mlp/"):
            expected[path] = params[path.replace("decoder", "encoder")]
        elif part[0] == "decoder" and part[2].endswith("attention"):
            expected[path] = params["/".join(["encoder/layers/attention", *part[3:]])]
        else:
            expected[path] = (fresh if part[0] == "decoder" else params)[path]
    assert_same(found, expected)
    assert not [name for name in read if not name.startswith(("params/encoder", "params/token"))]

    said = capsys.readouterr().err
    count = sum(not path.startswith("decoder") for path in params)
    assert f"Restored {count + 3 + 8} of {len(params)} parameters from {folder} at step 7" in said
    assert "'encoder/layers/mlp/\\1': 3\n" in said
    assert "'decoder/.*' fresh: " in said
    assert f"under their own paths: {count}\n" in said
    assert "  fresh: decoder/decoder_norm/scale, " in said
    assert "unused: decoder/decoder_norm/scale, decoder/layers/" in said
    # Each is an array of its own, so that all may be donated.
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
    again = jax.device_get(patterns.by_path(doubled(state.params)))
    assert_same(again, {path: 2 * leaf for path, leaf in expected.items()})


def test_another_model_is_taken_as_far_as_its_tensors_fit(source, tmp_path, capsys):
    folder, params = source
    changes = {"num_encoder_layers": 3, "mlp_activations": ("relu", "linear"), "vocab_size": 64}
    with pytest.raises(UserError, match=r"another architecture: its T5.mlp_activations is"):
        starting.start_state(opened(tmp_path, folder, changes))
    pairs = [("encoder/layers/.*", None)]
    capsys.readouterr()
    found, _ = started(opened(tmp_path, folder, changes, restore_map=pairs))
    said = capsys.readouterr().err
    assert "another architecture: its T5.num_encoder_layers is 2, this run's is 3" in said
    for path, leaf in found.items():
        if path.startswith("encoder/layers"):
            assert leaf.shape[0] == 3
        else:
            np.testing.assert_array_equal(leaf, params[path])

    with pytest.raises(UserError) as caught:
        starting.start_state(opened(tmp_path, folder, changes, restore_map=[(".*norm.*", "")]))
    assert "Tensor encoder/layers/attention/key/kernel is 2x16x16 float32" in str(caught.value)
    assert "is 3x16x16 float32 in this run (no pattern of Run.restore_map" in str(caught.value)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            [("decoder/(.*)", r"decodre/\1")],
            "lacks decodre/decoder_norm/scale .for decoder/decoder_norm/scale, by 'decoder/....'."
            ". Did you mean 'decoder/decoder_norm/scale'",
        ),
        (
            [("decoder/layers/mlp/(wi.*)/kernel", r"decoder/layers/mlp/wo/kernel")],
            "Tensor decoder/layers/mlp/wo/kernel is 2x32x16 float32 in the checkpoint .*, but "
            "decoder/layers/mlp/wi_0/kernel is 2x16x32 float32 in this run .by 'decoder/",
        ),
    ],
)
def test_sources_that_do_not_fit(source, tmp_path, pairs, message):
    session = opened(tmp_path, source[0], restore_map=pairs)
    with pytest.raises(UserError, match=message):
        starting.start_state(session)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"restore_map": [("encoder", "")]}, "restore_map: 'encoder' matches no .*'encoder/.*'"),
        (
            {"restore_map": [(".*", ""), ("encoder/.*", "encoder/x")]},
            "restore_map: 'encoder/.*' changes nothing",
        ),
        ({"restore_map": [(".*", "")]}, "Run.restore_map leaves every parameter fresh"),
        ({"restore_map": [("(", "")]}, r"Run.restore_map: '\(' is no regular expression"),
        (
            {"restore_map": [("encoder/(.*)", r"\2")]},
            r"restore_map: '..2' does not fit .*invalid group reference 2",
        ),
        ({"restore_map": [("a", r"\g<x>")]}, r"restore_map: .* does not fit .*unknown group name"),
        (
            {"restore_map": [(".*norm.*", "")], "restore_optimizer": "keep"},
            "set Run.restore_optimizer = 'drop' or remove the map",
        ),
        ({"restore_map": [("a", "")], "restore_from": ""}, "map needs a checkpoint: set Run.resto"),
    ],
)
def test_maps_that_cannot_be_meant_are_refused_before_anything_is_read(values, message, tmp_path):
    with pytest.raises(UserError, match=message):
        opened(tmp_path, "/nowhere", **values)
    assert not list(tmp_path.iterdir())


def test_a_plan_without_a_map_takes_everything_from_its_own_path():
    made = restore.plan((), ["b/c", "a"])
    assert made.sources == {"b/c": "b/c", "a": "a"}
    assert restore.rounds(made) == [made.sources]
    made = restore.plan([("a(.*)", "s"), ("b.*", r"s")], ["a1", "a2", "b", "c"])
    assert restore.rounds(made) == [{"s": "a1", "c": "c"}, {"s": "a2"}, {"s": "b"}]


def foreign(folder, kind):
    """A folder that holds no checkpoint of ours."""
    if kind == "file":
        folder.write_text("")
    elif kind != "missing":
        folder.mkdir()
    if kind == "hugging face":
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("")
    elif kind == "t5x":
        (folder / "checkpoint").write_text("")
    return folder


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", ["it is not there"]),
        ("file", ["it is a file, not a folder"]),
        ("empty", ["No checkpoint of mtl_jax", "mtl-jax convert", "DST --to mtl_jax"]),
        ("hugging face", ["a checkpoint of Hugging Face", "mtl-jax convert", "--to mtl_jax"]),
        ("t5x", ["a checkpoint of T5X", "mtl-jax convert", "--to mtl_jax"]),
    ],
)
def test_what_is_no_checkpoint_of_ours(tmp_path, kind, words):
    folder = foreign(tmp_path / "model", kind)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        starting.start_state(opened(tmp_path, folder))
    assert all(word in str(caught.value) for word in [*words, str(folder)])
    assert sorted(tmp_path.rglob("*")) == before


def test_architectures_of_older_checkpoints_are_completed(tmp_path):
    """Those written before umT5's bias tables had one table, and rescaled where they were tied."""

    def saved(**values):
        older = {"relpos_per_layer", "rescale_logits"}
        whole = dataclasses.asdict(model.T5Config(**MODEL, **values))
        return json.loads(json.dumps({k: v for k, v in whole.items() if k not in older}))

    def check(ours, theirs):
        opened(tmp_path, "", ours).check_model({"model": theirs}, "there")

    check({}, saved())
    check({"logits_via_embedding": True}, saved(logits_via_embedding=True))
    with pytest.raises(UserError, match=r"its T5.rescale_logits is False, this run's is True"):
        check({"rescale_logits": True}, saved())
    with pytest.raises(UserError, match=r"its T5.relpos_per_layer is False, this run's is True"):
        check({"relpos_per_layer": True}, saved())


# ---------------------------------------------------------------------------------------------
# Runs with frozen parameters
# ---------------------------------------------------------------------------------------------

# The state with the most parts: moments, momentum and a masked one.
RULE = {"min_dim_size_to_factor": 8, "momentum": 0.9, "weight_decay": 0.1, "clip_norm": 1.0}


def training(**changes):
    """A train step and its first state."""
    cfg = optim.OptimizerConfig(schedule="constant", **RULE, **changes)
    shape = golden.config("1.1")
    params = golden.params(shape)
    state = step.TrainState(jnp.int32(0), params, optim.make_optimizer(cfg).init(params))
    update = jax.jit(functools.partial(step.train_step, shape, objective.StepConfig(), cfg, 1))
    return lambda state: update(state, golden.batch(), jax.random.key(0))[0], state


def test_a_run_with_frozen_parameters_continues_from_its_checkpoint(tmp_path):
    update, state = training(freeze=["encoder/.*"])
    state = update(state)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, state, {}, {})
        checkpointer.wait()
        restored, _, _ = checkpointer.restore(1, abstract)
    expected, found = update(state), update(restored)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)

    for changes, word in (
        ({}, "lacks opt_state/"),
        ({"freeze": ["encoder/.*", "token.*"]}, "no place for opt_state/"),
    ):
        _, other = training(**changes)
        with (
            pytest.raises(UserError) as caught,
            Checkpointer(tmp_path / "checkpoints") as checkpointer,
        ):
            checkpointer.restore(1, other)
        assert "fits this run's model, but not its optimizer" in str(caught.value)
        assert word in str(caught.value)
        assert "Optimizer.freeze" in str(caught.value)


def test_the_state_of_a_run_with_frozen_parameters_lies_where_its_parameters_lie(tmp_path):
    groups = ["Optimizer.name='adamw'", "Optimizer.freeze=['encoder/.*']"]
    state = opened(tmp_path, "", values=groups).fresh_state()
    moments = checkpoint_fit.tensors(state.opt_state)
    own = patterns.by_path(state.params)
    for path, leaf in own.items():
        found = [moment for name, moment in moments.items() if name.endswith(f"mu/{path}")]
        expected = [] if path.startswith("encoder/") else [leaf.sharding]
        assert [moment.sharding for moment in found] == expected, path


def test_patterns_are_checked_before_a_run_is_made(tmp_path):
    with pytest.raises(UserError, match=r"Optimizer.freeze: 'encodr/.*' matches no parameter"):
        build.build(
            config.load([], ["Optimizer.freeze=['encodr/.*']", f"Run.directory={tmp_path}"])
        )


def test_maps_and_groups_survive_the_text_of_a_configuration(tmp_path):
    values = [
        r"Run.restore_map=[('decoder/(.*)', 'decoder/\\1'), ('x', None)]",
        "Run.restore_from='there'",
        "Optimizer.freeze=['a/.*']",
        "Optimizer.learning_rate_scale=[('b', 2), ('c', 0.5)]",
    ]
    loaded = config.load([], values)
    assert loaded.run.restore_map == (("decoder/(.*)", r"decoder/\1"), ("x", None))
    assert loaded.optimizer.learning_rate_scale == (("b", 2.0), ("c", 0.5))
    (tmp_path / "config.gin").write_text(loaded.text)
    again = config.load([str(tmp_path / "config.gin")])
    assert (again.run, again.optimizer) == (loaded.run, loaded.optimizer)
    assert hash(RunConfig()) == hash(RunConfig(restore_map=[]))


def test_keeping_an_optimizer_needs_a_checkpoint_to_keep_it_from():
    with pytest.raises(UserError, match=r"restore_optimizer = 'keep' needs .* Run\.restore_from"):
        RunConfig(restore_optimizer="keep")
