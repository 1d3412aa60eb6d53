"""The state of T5X's Adafactor goes on in ours, as in one written anew (`t5x_adafactor`)."""

import dataclasses
import json
import re
import shlex
import shutil
import textwrap
from pathlib import Path
from typing import Any

import flax.serialization
import golden
import hf_folders
import jax
import numpy as np
import pytest
import t5x_adafactor
import t5x_files

from mtl_jax import build, cli, config, interop, model, optim, starting
from mtl_jax.errors import UserError
from mtl_jax.interop import adafactor, convert
from mtl_jax.interop.source import by_path, pieces
from mtl_jax.tasks.embedded import VOCABULARY_FILE

ROOT = Path(__file__).parent.parent
STEPS = 4  # of T5X
SCHEDULE = {
    "Optimizer.schedule": "constant * linear_warmup * rsqrt_decay",
    "Optimizer.learning_rate": 0.5,
    "Optimizer.warmup_steps": 4,
}
# float64 against float32, whose step is 6e-8; the largest that was measured is 1e-6.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """A run of T5X: its model, the layout of its checkpoint, its Adafactor."""

    model: model.T5Config
    stacked: bool
    heads_apart: bool
    zarr: bool
    beta1: float | None = None
    min_dim: int = 8
    factored: bool = True
    least: int = 12  # what `Optimizer.min_dim_size_to_factor` is to be
    values: tuple[str, ...] = ()


# Sides of all kinds: embed 16 beside 24 joined ones of the heads, 12 of the MLP, 32 words.
ODD = golden.config("1.1", num_heads=3, mlp_dim=12, num_encoder_layers=3, num_decoder_layers=1)
# embed is 16, and so are the joined sides of the heads, and the number of layers.
EQUAL = golden.config(
    "1.0", mlp_dim=16, num_encoder_layers=16, num_decoder_layers=1, relpos_per_layer=True,
    logits_via_embedding=False, rescale_logits=False,
)  # fmt: skip
UMT5 = dataclasses.replace(ODD, relpos_per_layer=True)
CASES = {
    "t5": Case(ODD, False, False, False),
    "t5 zarr": Case(ODD, False, False, True),
    "t5, no matrix large enough": Case(ODD, False, False, False, min_dim=128, least=128),
    "t5, not factored": Case(
        golden.config("1.1", vocab_size=256, emb_dim=144, mlp_dim=16),
        *(False, False, True), factored=False, least=145, values=("Optimizer.clip_norm=1e9",),
    ),
    "t5, equal sides": Case(EQUAL, False, False, False, least=16),
    "scalable_t5": Case(UMT5, True, True, False, beta1=0.9),
    "scalable_t5 zarr": Case(
        UMT5, True, True, True, beta1=0.9, values=("Optimizer.clip_norm=1e9",)
    ),
    "scalable_t5, equal sides": Case(EQUAL, True, True, True, least=16),
    "stacked, heads joined": Case(ODD, True, False, False),
    "scalable_t5 unrolled": Case(UMT5, False, True, True, beta1=0.6),
}  # fmt: skip


def witness(case: Case) -> dict[str, t5x_adafactor.Parameter]:
    """T5X's parameters by name, after `STEPS` steps."""
    params = golden.params(case.model)
    tree = t5x_files.target(case.model, params, stacked=case.stacked, heads_apart=case.heads_apart)
    made = {
        name: t5x_adafactor.Parameter(name, x, case.min_dim, case.beta1, case.factored)
        for name, x in t5x_files.flat(tree).items()
    }
    for number in range(STEPS):
        advance(made, number)
    for one in made.values():
        one.x = one.x.astype(np.float32).astype(np.float64)  # as stored
    return made


def advance(parameters: dict[str, t5x_adafactor.Parameter], number: int) -> dict[str, np.ndarray]:
    """One step; returns its gradients."""
    gradients = t5x_adafactor.gradients(parameters, number)
    for name, one in parameters.items():
        one.update(number, t5x_adafactor.rate(number), gradients[name])
    return gradients


def values(parameters: dict[str, t5x_adafactor.Parameter]) -> dict[str, np.ndarray]:
    return {name: one.x for name, one in parameters.items()}


def stored(parameters: dict[str, t5x_adafactor.Parameter]) -> dict[str, np.ndarray]:
    """T5X's `param_states` by name."""
    return {
        f"{name}/{moment}": x
        for name, one in parameters.items()
        for moment, x in one.stored().items()
    }


def write(
    folder: Path, case: Case, parameters: dict[str, t5x_adafactor.Parameter], step: int = STEPS
) -> Path:
    target = {name: x.astype(np.float32) for name, x in values(parameters).items()}
    return t5x_files.write(
        folder,
        t5x_files.nested(target),
        t5x_files.nested(stored(parameters)),
        step=step,
        zarr=case.zarr,
    )


def keep(source: Path, target: Path) -> int:
    words = ("convert", source, target, "--to", "mtl_jax", "--optimizer", "keep")
    return cli.main(list(map(str, words)))


def opened(folder: Path, *given: str, what: str = "keep") -> build.Session:
    """The session of a run that starts from a converted checkpoint."""
    files = [str(folder / name) for name in ("model.gin", "optimizer.gin")]
    run = {
        "Run.directory": str(folder.parent / "run"),
        "Run.restore_from": str(folder),
        "Run.restore_optimizer": what,
        "Run.compile_cache": False,
    }
    return build.build(
        config.load(files, [f"{name}={x!r}" for name, x in (run | SCHEDULE).items()] + [*given])
    )


@pytest.mark.parametrize("name", CASES)
def test_the_next_steps_are_those_of_t5x(tmp_path, name):
    case = CASES[name]
    parameters = witness(case)
    assert keep(write(tmp_path / "theirs", case, parameters), tmp_path / "ours") == 0
    momentum = [f"Optimizer.momentum={case.beta1}"] if case.beta1 else []
    session = opened(tmp_path / "ours", *momentum, *case.values)
    assert session.config.model == case.model
    assert session.config.optimizer.min_dim_size_to_factor == case.least
    state = starting.start_state(session)
    assert jax.tree.structure(state) == jax.tree.structure(session.abstract_state)
    assert jax.tree.map(lambda x: x.sharding, state) == session.shardings
    counts = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 0]
    assert [int(x) for x in (state.step, *counts)] == [STEPS] * (2 + bool(case.beta1))
    state = jax.device_get(state)
    optimizer = optim.make_optimizer(session.config.optimizer)
    update, opt_state = jax.jit(optimizer.update), state.opt_state
    for number in (STEPS, STEPS + 1):
        before = t5x_files.ours(case.model, values(parameters))
        gradients = t5x_files.ours(case.model, advance(parameters, number))
        after = t5x_files.ours(case.model, values(parameters))
        params = jax.tree.map(np.float32, before)
        updates, opt_state = update(gradients, opt_state, params)
        for path, x in by_path(updates).items():
            expected = by_path(after)[path] - by_path(before)[path]
            error = np.abs(x - expected).max() / np.abs(expected).max()
            assert error < TOLERANCE, (path, number)


def test_a_kept_state_may_be_dropped_and_the_parameters_leave_again(tmp_path, capsys):
    case = CASES["scalable_t5 zarr"]
    parameters = witness(case)
    assert keep(write(tmp_path / "theirs", case, parameters), tmp_path / "ours") == 0
    told = capsys.readouterr()
    assert "parameters and the optimizer's state of step 4 to" in told.out
    assert "set Optimizer.momentum to T5X's Adafactor.beta1" in told.err
    state = starting.start_state(opened(tmp_path / "ours", what="drop"))
    assert int(state.step) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    source = interop.open_source(tmp_path / "ours")
    assert source.step == STEPS
    convert.convert(source, tmp_path / "hf", "hf")
    back = interop.open_source(tmp_path / "hf")
    expected = t5x_files.ours(case.model, values(parameters))
    for path, layer, _ in pieces(back.config):
        x = by_path(expected)[path]
        np.testing.assert_array_equal(
            back.read(path, layer), np.float32(x if layer is None else x[layer])
        )


def test_weight_decay_and_clipping_change_nothing_of_a_kept_state(tmp_path):
    case = CASES["scalable_t5"]
    keep(write(tmp_path / "theirs", case, witness(case)), tmp_path / "ours")
    plain, more = (
        starting.start_state(opened(tmp_path / "ours", "Optimizer.momentum=0.9", *given))
        for given in ((), ("Optimizer.clip_norm=1.0", "Optimizer.weight_decay=0.1"))
    )
    assert jax.tree.structure(plain) != jax.tree.structure(more)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(more), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.data
@pytest.mark.parametrize("name", ["t5x_tiny_legacy/checkpoint_0", "t5x_tiny_zarr/checkpoint_3"])
def test_states_of_t5x_itself(data_folder, tmp_path, name):
    """Bit by bit: nothing in these is factored, so a state lies as its parameter does."""
    path = data_folder / "checkpoints" / name
    source = interop.open_source(path)
    kept = adafactor.kept_optimizer(source)
    assert (kept.step, kept.min_dim_size_to_factor) == (int(name[-1]), 128)
    file = path / "checkpoint" if path.is_dir() else path
    tree = flax.serialization.msgpack_restore(file.read_bytes())["optimizer"]["state"]
    leaves = t5x_files.flat(tree["param_states"])
    read = by_path(kept.state[0].v)
    for piece_path, layer, shape in pieces(source.config):
        expected = leaves[f"{source.name(piece_path, layer)}/v"]
        x = read[piece_path].read(layer)
        assert x.shape == shape
        np.testing.assert_array_equal(x, expected)
        assert x.any() == ("zarr" in name)


@pytest.mark.slow
def test_training_goes_on_as_the_page_says(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    text = text[text.index("`--optimizer keep` takes along") :]
    command, gin = re.findall(r"\n\n((?:    .*\n)+)", text)[:2]
    shape = dict(vocab_size=272, num_encoder_layers=2, num_decoder_layers=2)
    case = dataclasses.replace(CASES["t5"], model=dataclasses.replace(ODD, **shape))
    parameters = witness(case)
    monkeypatch.chdir(tmp_path)
    write(Path("checkpoint_1000000"), case, parameters, step=10**6)
    shutil.copy(VOCABULARY_FILE, "spiece.model")
    program, *words = shlex.split(command)
    assert program == "mtl-jax"
    assert cli.main(words) == 0
    Path("goes_on.gin").write_text(textwrap.dedent(gin))
    more = {
        **{"Data.task_modules": "('tiny_tasks',)", "Data.mixture": "'tiny'"},
        **{"Data.inputs_length": 16, "Data.targets_length": 12, "Data.batch_size": 8},
        **{"Run.steps": 10**6 + 2, "Run.log_every": 1},
    }
    given = [f"--gin.{name}={value}" for name, value in more.items()]
    capsys.readouterr()
    assert cli.main(["train", "--gin_file=goes_on.gin", *given]) == 0
    told = "Restored parameters and optimizer state from my_t5x at step 1,000,000"
    assert told in capsys.readouterr().err
    lines = Path("runs/goes_on/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    assert [row["step"] for row in rows] == [10**6 + 1, 10**6 + 2]
    # The rate of the first update here, T5X's number 1,000,000: 1 / sqrt(1,000,000).
    assert rows[0]["learning_rate"] == pytest.approx(1e-3, rel=1e-6)
    # A fresh second moment would be that of one batch; this one has hardly moved from T5X's.
    session = build.build(config.load(["runs/goes_on/config.gin"]))
    states = []
    for place in ("my_t5x", "runs/goes_on"):
        checkpointer, number = build.open_checkpoint(place)
        with checkpointer:
            states.append(checkpointer.restore(number, session.abstract_state)[0])
    before, after = (state.opt_state[0] for state in states)
    assert int(after.step) == 10**6 + 2
    for a, b in zip(jax.tree.leaves(before.v), jax.tree.leaves(after.v), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * max(np.abs(a).max(), 1.0))
    other = ["Run.directory='runs/other'", "Optimizer.name='adamw'"]
    given += [f"--gin.{x}" for x in (*other, "Optimizer.min_dim_size_to_factor=128")]
    assert cli.main(["train", "--gin_file=goes_on.gin", *given]) == 1
    assert "set Optimizer.name = 'adafactor'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------


def _no_state(found: dict[str, Any]) -> dict[str, Any]:
    return {}


def _adam(found: dict[str, Any]) -> dict[str, Any]:
    return {f"0/{moment}/{name}": x for name, x in found.items() for moment in ("mu", "nu")}


def _changed(name: str, x: Any) -> Any:
    return lambda found: found | {name: x}


def _without(name: str) -> Any:
    return lambda found: {key: x for key, x in found.items() if key != name}


QUERY = "encoder/encoder/attention/query/kernel"
OUT = "encoder/encoder/attention/out/kernel"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_state, "holds parameters but no optimizer state"),
        (_adam, r"lacks decoder/decoder_norm/scale/v_row\. What can be kept is that of T5X's"),
        (_without(f"{OUT}/v_col"), f"the optimizer's state lacks {OUT}/v_col"),
        (_changed(f"{OUT}/a", np.zeros(3)), rf"has {OUT}/a \(3\), which that of T5X's Adafactor"),
        (_changed(f"{OUT}/m", None), f"tensor {OUT}/m is no array but None"),
        (
            # T5X's names of axes, and not the sizes, say what is a row.
            _changed(f"{QUERY}/v_row", np.zeros((3, 3, 8))),
            rf"state {QUERY}/v_row is 3x3x8, but by .* it is 16x3 for {QUERY} \(16x3x3x8\)",
        ),
        (
            _changed(f"{OUT}/v", np.zeros((3, 3, 8, 16))),
            rf"state {OUT}/v_row is 3x16, but by .* it is 1 for {OUT} \(3x3x8x16\)",
        ),
        (_changed(f"{OUT}/m", np.zeros(1)), rf"{OUT}/m is 1, but by .* it is 3x3x8x16 for {OUT}"),
        (
            lambda found: found | {
                "token_embedder/embedding/v": np.zeros((32, 16)),
                "token_embedder/embedding/v_row": np.zeros(1),
                "token_embedder/embedding/v_col": np.zeros(1),
            },
            r"factored \S*/mlp/w\S* \((16x12|12x16)\), but not token_embedder/embedding \(32x16\)",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_told(tmp_path, spoil, message, capsys):
    case = CASES["scalable_t5"]
    parameters = witness(case)
    target = {name: x.astype(np.float32) for name, x in values(parameters).items()}
    found = t5x_files.nested(spoil(stored(parameters)))
    made = t5x_files.write(tmp_path / "theirs", t5x_files.nested(target), found)
    with pytest.raises(UserError, match=rf"{message}.*--optimizer drop"):
        convert.convert(
            interop.open_source(made), tmp_path / "ours", "mtl_jax", keep_optimizer=True
        )
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    assert cli.main(["convert", str(made), str(tmp_path / "ours"), "--to", "mtl_jax"]) == 0
    assert ("--optimizer keep takes it along" in capsys.readouterr().err) == bool(found)


def test_a_damaged_state_leaves_nothing_behind(tmp_path, capsys):
    case = CASES["t5 zarr"]
    made = write(tmp_path / "theirs", case, witness(case))
    matrix = "state.param_states.encoder.relpos_bias.rel_embedding.v"
    (made / matrix / "0.0").unlink()
    assert keep(made, tmp_path / "ours") == 1
    assert "tensor encoder/relpos_bias/rel_embedding/v (3x32) cannot be read" in (
        capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_sources_and_targets_without_a_state(tmp_path):
    case = CASES["t5"]
    theirs = write(tmp_path / "theirs", case, witness(case))
    folder = hf_folders.make(tmp_path / "made", "t5")
    convert.convert(interop.open_source(theirs), tmp_path / "ours", "mtl_jax")
    for path, to, message in (
        (
            theirs,
            "hf",
            "has no place for an optimizer's state. Use --to mtl_jax, or --optimizer dr",
        ),
        (folder, "mtl_jax", "has no state of an optimizer. Use --optimizer drop"),
        (tmp_path / "ours", "mtl_jax", "Run.restore_optimizer = 'keep', or use --optimizer drop"),
    ):
        with pytest.raises(UserError, match=message):
            convert.convert(interop.open_source(path), tmp_path / "out", to, keep_optimizer=True)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    case = dataclasses.replace(CASES["scalable_t5"], beta1=None)
    keep(write(folder / "theirs", case, witness(case)), folder / "ours")
    return folder / "ours"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ("Optimizer.name='adamw'", "Optimizer.min_dim_size_to_factor=128"),
            "optimizer state of adafactor, and Optimizer.name is 'adamw': set Optimizer.name = 'ad",
        ),
        (("Optimizer.momentum=0.9",), "holds no momentum, and Optimizer.momentum is 0.9: set it"),
        (
            ("Optimizer.min_dim_size_to_factor=128",),
            "other matrices are factored than with Optimizer.min_dim_size_to_factor = 128: set it "
            "to 12, or set Run.restore_optimizer = 'drop'",
        ),
        (("Optimizer.freeze=('encoder/.*',)",), "the run has no place for opt_state/0/v/encoder/"),
        (("T5.mlp_dim=16",), "T5.mlp_dim is 12|is 16x12 float32 in the checkpoint and 16x16"),
    ],
)
def test_a_run_with_another_optimizer_is_refused(converted, given, message):
    session = opened(converted, *given)
    with pytest.raises(UserError, match=message):
        starting.start_state(session)


def test_momentum_that_the_run_lacks_is_told(tmp_path):
    case = CASES["scalable_t5"]
    keep(write(tmp_path / "theirs", case, witness(case)), tmp_path / "ours")
    with pytest.raises(UserError, match="is 0: set it to T5X's Adafactor"):
        starting.start_state(opened(tmp_path / "ours"))
