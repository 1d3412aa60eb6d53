"""Checkpoints: what stays, what comes back, and what is said when something is wrong."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mtl_jax.checkpoint import CheckpointConfig, Checkpointer
from mtl_jax.errors import UserError


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    balance: dict


def make_state(step=0, width=4, mesh=None, spec=()):
    """A state with a chained optimizer (named tuples, empty tuples) and an empty dict."""
    values = np.random.RandomState(step).randn(8, width).astype(np.float32)
    kernel = jnp.asarray(values)
    if mesh is not None:
        kernel = jax.device_put(kernel, NamedSharding(mesh, P(*spec)))
    params = {"encoder": {"kernel": kernel}, "scale": jnp.ones(3) * step}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return State(jnp.int32(step), params, optimizer.init(params), {})


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save_steps(folder, cfg, metrics_by_step):
    with Checkpointer(folder, cfg) as checkpointer:
        for step, metrics in metrics_by_step.items():
            checkpointer.save(step, make_state(step), {}, {}, metrics)
        checkpointer.wait()
        return checkpointer.steps()


def assert_trees_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_state_data_position_and_meta_come_back_as_one_unit(tmp_path, asynchronous):
    state = make_state(7)
    data_state = {"draw": 12, "tasks": {"a": [1, 30]}, "pending": [[5, 6], []]}
    meta = {"model": {"emb_dim": 4}, "task_ids": {"a": 1}}
    with Checkpointer(tmp_path / "c", CheckpointConfig(asynchronous=asynchronous)) as checkpointer:
        assert checkpointer.latest() is None
        assert checkpointer.save(7, state, data_state, meta)
        checkpointer.wait()
        assert not checkpointer.save(7, make_state(8), {}, {}), "a step is saved once"
        assert checkpointer.latest() == 7
    with Checkpointer(tmp_path / "c") as checkpointer:
        restored, found_data, found_meta = checkpointer.restore(None, abstract(state))
        assert checkpointer.meta() == meta
    assert_trees_equal(restored, state)
    assert (found_data, found_meta) == (data_state, meta)


def test_a_state_donated_right_after_save_is_saved_as_it_was(tmp_path):
    """Training overwrites the buffers at once; the background save must have copied them."""
    state = make_state(1)
    kept = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    with Checkpointer(tmp_path / "c") as checkpointer:
        form = abstract(state)
        checkpointer.save(1, state, {}, {})
        jax.block_until_ready(overwrite(state))
        checkpointer.wait()
        restored, _, _ = checkpointer.restore(1, form)
    assert_trees_equal(jax.tree.map(np.array, restored), kept)


def test_restore_onto_another_mesh_is_bit_identical(tmp_path):
    auto = (AxisType.Auto, AxisType.Auto)
    saved_on = jax.make_mesh((8, 1), ("fsdp", "tensor"), axis_types=auto)
    wanted_on = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=auto)
    state = make_state(3, mesh=saved_on, spec=("fsdp", None))
    target = abstract(make_state(3, mesh=wanted_on, spec=("fsdp", "tensor")))
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(3, state, {}, {})
        checkpointer.wait()
        restored, _, _ = checkpointer.restore(3, target)
    kernel = restored.params["encoder"]["kernel"]
    assert kernel.sharding.spec == P("fsdp", "tensor")
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(4, 1)}
    assert_trees_equal(jax.tree.map(np.array, restored), jax.tree.map(np.array, state))


def test_an_early_best_does_not_cost_the_newest(tmp_path):
    """T5X with keep=1 and an early best kept that one and deleted the newest."""
    cfg = CheckpointConfig(keep=1, keep_best=1, best_metric="accuracy")
    scores = {5: 0.9, 10: 0.2, 15: 0.3, 20: 0.1, 25: 0.0}
    assert save_steps(tmp_path / "c", cfg, {s: {"accuracy": v} for s, v in scores.items()}) == [
        5,
        25,
    ]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep": 2}, [5, 6]),
        ({"keep": 1, "keep_every": 2}, [2, 4, 6]),
        ({"keep": 1, "keep_every": 4}, [4, 6]),
        ({"keep": 1, "keep_best": 2, "best_metric": "loss", "best_mode": "min"}, [2, 5, 6]),
        ({"keep": 1, "keep_best": 1, "best_metric": "loss", "best_mode": "max"}, [1, 6]),
        ({"keep": 1, "keep_best": 2, "best_metric": "loss", "best_mode": "min", "keep_every": 3},
         [2, 3, 5, 6]),
        ({"keep": 10}, [1, 2, 3, 4, 5, 6]),
    ],
)  # fmt: skip
def test_the_rules_of_keeping(tmp_path, settings, kept):
    losses = {1: 9.0, 2: 0.5, 3: 5.0, 4: 4.0, 5: 1.0, 6: 3.0}
    metrics = {step: {"loss": loss, "other": -step} for step, loss in losses.items()}
    assert save_steps(tmp_path / "c", CheckpointConfig(**settings), metrics) == kept


def test_unmeasured_and_not_finite_steps_are_never_best(tmp_path):
    cfg = CheckpointConfig(keep=1, keep_best=1, best_metric="loss", best_mode="min")
    metrics = {1: {"loss": float("nan")}, 2: {"loss": 2.0}, 3: None, 4: {"loss": 3.0}, 5: None}
    assert save_steps(tmp_path / "c", cfg, metrics) == [2, 5]


def test_the_best_is_remembered_over_a_restart(tmp_path):
    cfg = CheckpointConfig(keep=1, keep_best=1, best_metric="accuracy")
    save_steps(tmp_path / "c", cfg, {1: {"accuracy": 0.9}, 2: {"accuracy": 0.1}})
    later = {3: {"accuracy": 0.5}, 4: {"accuracy": 0.2}}
    assert save_steps(tmp_path / "c", cfg, later) == [1, 4]


def test_parameters_alone(tmp_path):
    state = make_state(2)
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(2, state, {}, {"task_ids": {"a": 1}})
        checkpointer.wait()
    with Checkpointer(tmp_path / "c", read_only=True) as reader:
        params, meta = reader.restore_parameters(None, abstract(state).params)
        assert_trees_equal(params, state.params)
        assert meta == {"task_ids": {"a": 1}}
        with pytest.raises(UserError, match=r"tensor params/encoder/kernel is 8x4 .* and 8x5"):
            reader.restore_parameters(None, abstract(make_state(2, width=5)).params)


def test_a_reader_sees_what_a_run_saves_later(tmp_path):
    with Checkpointer(tmp_path / "c", CheckpointConfig(keep=1)) as writer:
        writer.save(1, make_state(1), {}, {})
        writer.wait()
        with Checkpointer(tmp_path / "c", read_only=True) as reader:
            assert reader.steps() == [1]
            writer.save(2, make_state(2), {}, {})
            writer.wait()
            assert reader.steps() == [2]


def test_another_architecture_names_the_tensor_and_both_shapes(tmp_path):
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(1, make_state(1), {}, {})
        checkpointer.wait()
        before = sorted(path for path in (tmp_path / "c").rglob("*"))
        wider = abstract(make_state(1, width=6))
        with pytest.raises(UserError, match=r"encoder/kernel is 8x4 float32 .* 8x6 float32"):
            checkpointer.restore(None, wider)

        other = abstract(make_state(1))
        params = {"encoder": other.params["encoder"], "bias": other.params["scale"]}
        with pytest.raises(UserError) as caught:
            checkpointer.restore(None, other.replace(params=params))
        assert "lacks params/bias" in str(caught.value)
        assert "no place for params/scale" in str(caught.value)

        halved = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
        params = {**other.params, "scale": halved}
        with pytest.raises(UserError, match=r"params/scale is 3 float32 .* 3 bfloat16"):
            checkpointer.restore(None, other.replace(params=params))
        assert sorted((tmp_path / "c").rglob("*")) == before, "nothing on disk may change"
        assert_trees_equal(checkpointer.restore(None, other)[0], make_state(1))


def test_missing_checkpoints_are_told(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        Checkpointer(tmp_path / "nowhere", read_only=True)
    with Checkpointer(tmp_path / "c") as checkpointer:
        with pytest.raises(UserError, match="holds no complete checkpoint"):
            checkpointer.restore(None, abstract(make_state()))
        checkpointer.save(4, make_state(4), {}, {})
        checkpointer.wait()
        with pytest.raises(UserError, match="of step 3, but of 4"):
            checkpointer.restore(3, abstract(make_state()))
        with pytest.raises(UserError, match="already holds the later step 4"):
            checkpointer.save(3, make_state(3), {}, {})


@pytest.mark.parametrize("victim", ["meta/metadata", "data_state/metadata", "state/_METADATA"])
def test_a_damaged_checkpoint_is_told_and_an_older_one_still_works(tmp_path, victim):
    save_steps(tmp_path / "c", CheckpointConfig(keep=2), {1: None, 2: None})
    (tmp_path / "c" / "2" / victim).write_text('{"half', encoding="utf-8")
    with Checkpointer(tmp_path / "c") as checkpointer:
        with pytest.raises(UserError, match=r"step 2 .* damaged .* continue from step 1"):
            checkpointer.restore(None, abstract(make_state(2)))
        assert_trees_equal(checkpointer.restore(1, abstract(make_state(1)))[0], make_state(1))


def test_damaged_arrays_are_told(tmp_path):
    # One array only: Orbax reads the others on in the background while it reports the first.
    state = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(1, state, {}, {})
    for path in (tmp_path / "c" / "1" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:3])
    with (
        Checkpointer(tmp_path / "c") as checkpointer,
        pytest.raises(UserError, match=r"damaged .* There is no older checkpoint"),
    ):
        checkpointer.restore(None, abstract(state))


def fail_with(monkeypatch, error):
    def restore(*arguments, **named):
        raise error

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.restore", restore)


@pytest.mark.parametrize(
    "told",
    [
        "RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.",
        "UNAVAILABLE: Connection closed by peer [127.0.0.1]:4242",  # another process has died
        "INTERNAL: Gloo all-reduce failed: Connection reset by peer",
    ],
)
def test_what_jax_tells_is_not_blamed_on_the_files(tmp_path, monkeypatch, told):
    save_steps(tmp_path / "c", CheckpointConfig(), {1: None, 2: None})
    error = jax.errors.JaxRuntimeError(told)
    fail_with(monkeypatch, error)
    with (
        Checkpointer(tmp_path / "c", read_only=True) as reader,
        pytest.raises(jax.errors.JaxRuntimeError) as caught,
    ):
        reader.restore(None, abstract(make_state(2)))
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        ValueError("PERMISSION_DENIED: Error opening file [OS error 13: EACCES Permission denied]"),
    ],
)
def test_a_refused_permission_is_not_blamed_on_the_files(tmp_path, monkeypatch, error):
    save_steps(tmp_path / "c", CheckpointConfig(), {1: None, 2: None})
    fail_with(monkeypatch, error)
    with (
        Checkpointer(tmp_path / "c", read_only=True) as reader,
        pytest.raises(UserError, match=r"Could not read .* step 2 .*: no permission") as caught,
    ):
        reader.restore(None, abstract(make_state(2)))
    assert "damaged" not in str(caught.value)
    assert "Delete" not in str(caught.value)


def test_left_overs_of_a_killed_save_are_ignored_and_removed(tmp_path):
    save_steps(tmp_path / "c", CheckpointConfig(), {1: None})
    left_over = tmp_path / "c" / "2.orbax-checkpoint-tmp"
    (left_over / "state").mkdir(parents=True)
    with Checkpointer(tmp_path / "c", read_only=True) as reader:
        assert reader.steps() == [1]
        assert left_over.exists(), "a reader must leave the save of a running job alone"
    with Checkpointer(tmp_path / "c") as checkpointer:
        assert checkpointer.steps() == [1]
        checkpointer.save(2, make_state(2), {}, {})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2]
    assert not left_over.exists()


_KILLED = """
    import sys, time
    import jax, jax.numpy as jnp
    from mtl_jax.checkpoint import CheckpointConfig, Checkpointer
    folder, size = sys.argv[1], int(sys.argv[2])
    checkpointer = Checkpointer(folder, CheckpointConfig(keep=1))
    state = lambda step: {"w": jax.random.normal(jax.random.key(step), (size, 1024))}
    checkpointer.save(1, state(1), {"position": 1}, {})
    checkpointer.wait()
    checkpointer.save(2, state(2), {"position": 2}, {})
    print("saving", flush=True)
    time.sleep(60)
"""


def test_kill_in_the_middle_of_an_asynchronous_save(tmp_path):
    """SIGKILL while the second save is under way: the first is complete and restorable."""
    rows = 12 * 1024  # 48 MiB: long enough to be caught writing
    folder = tmp_path / "c"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_KILLED), str(folder), str(rows)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    try:
        deadline = time.monotonic() + 60
        while not list(folder.glob("2*")) and time.monotonic() < deadline:
            time.sleep(0.002)
        assert list(folder.glob("2*")), "the second save never began"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    left = {path.name for path in folder.iterdir()}
    assert any(name.startswith("2.orbax-checkpoint-tmp") for name in left), left
    form = {"w": jax.ShapeDtypeStruct((rows, 1024), jnp.float32)}
    with Checkpointer(folder, CheckpointConfig(keep=1)) as checkpointer:
        assert checkpointer.steps() == [1]
        state, data_state, _ = checkpointer.restore(None, form)
        assert data_state == {"position": 1}
        expected = jax.random.normal(jax.random.key(1), (rows, 1024))
        np.testing.assert_array_equal(np.asarray(state["w"]), np.asarray(expected))
        # The run goes on: the same step is saved again, and the left-over is gone.
        checkpointer.save(2, {"w": jnp.zeros((2, 2))}, {"position": 2}, {})
        checkpointer.wait()
        assert {path.name for path in folder.glob("[!.]*")} == {"2"}


_REFUSED = """
    import resource, signal, sys
    import jax
    from mtl_jax.checkpoint import CheckpointConfig, Checkpointer
    from mtl_jax.errors import UserError
    checkpointer = Checkpointer(sys.argv[1], CheckpointConfig(keep=1))
    state = lambda step: {"w": jax.random.normal(jax.random.key(step), (256, 1024))}
    checkpointer.save(1, state(1), {}, {})
    checkpointer.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        checkpointer.save(2, state(2), {}, {})
        checkpointer.wait()
    except UserError as error:
        print(error, flush=True)
"""


def test_the_old_checkpoint_outlives_a_save_that_the_system_refuses(tmp_path):
    """The kernel refuses to write the second one (file size limit): one message, first intact."""
    folder = tmp_path / "c"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_REFUSED), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.stdout.startswith("Could not "), done.stderr[-2000:]
    assert done.stdout.strip().endswith(f"in {folder}: {os.strerror(errno.EFBIG)}.")
    form = {"w": jax.ShapeDtypeStruct((256, 1024), jnp.float32)}
    with Checkpointer(folder, read_only=True) as reader:
        assert reader.steps() == [1]
        expected = jax.random.normal(jax.random.key(1), (256, 1024))
        np.testing.assert_array_equal(reader.restore(None, form)[0]["w"], expected)


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "c").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="is a file"):
        Checkpointer(tmp_path / "c")
    assert (tmp_path / "c").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "Checkpoint.keep = 0.*never deleted"),
        ({"every": -1}, "Checkpoint.every = -1"),
        ({"keep_best": 1}, "belong together"),
        ({"best_metric": "loss"}, "belong together"),
        ({"best_mode": "mix"}, "Checkpoint.best_mode = 'mix'.*'max'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        CheckpointConfig(**settings)


def test_an_unknown_best_metric_names_the_nearest(tmp_path):
    cfg = CheckpointConfig(keep_best=1, best_metric="acuracy")
    with (
        Checkpointer(tmp_path / "c", cfg) as checkpointer,
        pytest.raises(UserError, match=r"'acuracy' was not measured. Did you mean 'accuracy'"),
    ):
        checkpointer.save(1, make_state(1), {}, {}, {"accuracy": 1.0, "loss": 2.0})


def test_meta_is_plain_json_on_disk(tmp_path):
    """Another program can read what a checkpoint is about."""
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(1, make_state(1), {"draw": 3}, {"model": {"emb_dim": 4}})
    stored = json.loads((tmp_path / "c" / "1" / "meta" / "metadata").read_text(encoding="utf-8"))
    assert stored == {"model": {"emb_dim": 4}}
