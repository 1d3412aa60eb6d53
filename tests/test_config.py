"""The Gin configuration: values, types, places of mistakes, round trip."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import pytest
from gin import config_parser
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax import config
from mtl_jax.config_types import format_value, matched
from mtl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Model:
    emb_dim: int = 64
    dropout_rate: float = 0.0
    activations: Sequence[str] = ("gelu", "linear")
    dtype: Literal["float32", "bfloat16"] = "float32"
    tied: bool = False

    def __post_init__(self):
        if self.emb_dim < 1:
            raise ValueError(f"emb_dim must be positive, not {self.emb_dim}")


@dataclasses.dataclass(frozen=True)
class Run:
    steps: int
    folder: str = ""
    maximum: float | None = None
    rates: Mapping[str, float] | str = "examples"
    shape: tuple[int, int] = (1, 1)
    notes: str | None = None


TYPES = {"Model": Model, "Run": Run}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file below the working directory, which is a new folder."""
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return write_file


def load(files=(), bindings=(), search_paths=()):
    return config.load_rooms(files, bindings, search_paths, TYPES)


def refusal(files=(), bindings=(), search_paths=()) -> str:
    with pytest.raises(UserError) as caught:
        load(files, bindings, search_paths)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_blocks_includes_and_macros(write):
    write("base.gin", "STEPS = 10\nRun.steps = %STEPS\nModel.emb_dim = 8  # comment\n")
    name = write(
        "runs/a.gin",
        "include 'base.gin'\nSTEPS = 20\nModel:\n  dropout_rate = 1\n  activations = ['relu']\n"
        "Run.rates = {'a': 1,\n  'b': 2.5}\nRun.shape = [2, %STEPS]\n",
    )
    rooms = load([name])
    assert rooms["Model"] == Model(emb_dim=8, dropout_rate=1.0, activations=("relu",))
    # The last definition of the macro holds everywhere, as in gin.
    assert rooms["Run"] == Run(steps=20, rates={"a": 1.0, "b": 2.5}, shape=(2, 20))
    assert isinstance(rooms["Model"].dropout_rate, float)


def test_later_values_win_and_flags_beat_files(write):
    first = write("first.gin", "Run.steps = 1\nModel.emb_dim = 1\nModel.emb_dim = 2\n")
    second = write("second.gin", "Run.steps = 3\n")
    rooms = load([first, second], ["Model.emb_dim=4", "Model.emb_dim=5"])
    assert rooms["Run"].steps == 3
    assert rooms["Model"].emb_dim == 5
    assert load([second, first])["Run"].steps == 1


def test_loads_do_not_touch_each_other(write):
    load([write("a.gin", "N = 3\nRun.steps = %N\nModel.emb_dim = 7\n")])
    assert load(bindings=["Run.steps=1"]) == {"Model": Model(), "Run": Run(steps=1)}


def test_flags_need_no_quotes():
    rooms = load(
        bindings=[
            "Run.steps=%N",
            "N=5",
            "Run.folder=runs/a b-*.x",
            "Run.notes=2024",
            "Run.rates=equal",
            'Model.activations=["a", "b"]',
            "Run.maximum=None",
            "Model.tied=True",
            "Model.dtype='bfloat16'",
        ]
    )
    # 2024 is a literal, but the field wants text.
    assert rooms["Run"] == Run(steps=5, folder="runs/a b-*.x", notes="2024", rates="equal")
    assert rooms["Model"] == Model(activations=("a", "b"), tied=True, dtype="bfloat16")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Modell.emb_dim = 1", "x.gin:2: unknown name 'Modell'. Did you mean 'Model'?"),
        ("Model.emb_dims = 1", "x.gin:2: Model has no field 'emb_dims'. Did you mean 'emb_dim'?"),
        ("Model.emb_dim = '8'", "x.gin:2: Model.emb_dim must be an int, not '8' (str)"),
        ("Model.emb_dim = 8.0", "x.gin:2: Model.emb_dim must be an int, not 8.0 (float)"),
        ("Model.emb_dim = True", "x.gin:2: Model.emb_dim must be an int, not True (bool)"),
        ("Model.tied = 1", "x.gin:2: Model.tied must be a bool, not 1 (int)"),
        ("Model.activations = 'relu'", "must be a list of str, not 'relu' (str)"),
        ("Model.activations = ['relu', 1]", "must be a list of str, not ['relu', 1] (list)"),
        ("Model.dtype = 'float16'", "must be one of 'float32', 'bfloat16', not 'float16'"),
        ("Model.emb_dim = None", "x.gin:2: Model.emb_dim must be an int, not None"),
        (
            "Model.emb_dim = 0",
            "Model: emb_dim must be positive, not 0 (set: Model.emb_dim at x.gin:2)",
        ),
        ("Run.maximum = 'x'", "x.gin:2: Run.maximum must be a float or None, not 'x' (str)"),
        ("Run.rates = {'a': 'b'}", "must be a dict of str to float or a str, not {'a': 'b'}"),
        ("Run.shape = (1, 2, 3)", "x.gin:2: Run.shape must be a tuple of 2 values"),
        ("Run.folder = @Model", "x.gin:2: @Model: Gin files here set values only"),
        ("Run.shape = (1, @Model())", "x.gin:2: @Model: Gin files here set values only"),
        ("Run.steps = %STEPZ\nSTEPS = 1", "x.gin:2: %STEPZ is not defined. Did you mean 'STEPS'?"),
        ("STEPS = 4", "x.gin:2: the macro STEPS is used nowhere"),
        ("A = %B\nB = %A\nRun.steps = %A", "a macro is defined by itself: %A -> %B -> %A"),
        ("Model = 4", "x.gin:2: Model has fields: write Model.FIELD"),
        ("import os", "x.gin:2: Gin files here set values only; imports have no meaning"),
        ("eval/Model.emb_dim = 1", "x.gin:2: scopes (eval/...) are not supported"),
        ("Model.emb_dim = 1 +", "x.gin:2: cannot be read as Gin"),
        ("Model.emb_dim = (1,", "cannot be read as Gin"),
        ("Model.emb_dim = hello", "x.gin:2: cannot be read as Gin"),
        ("Model.emb_dim = $", "x.gin:2: cannot be read as Gin"),
        ("include 'x.gin'", "x.gin includes itself (included at x.gin:2)"),
        ("include 'y.gin'", "no Gin file 'y.gin'; looked in"),
    ],
)
def test_mistakes_name_file_line_and_remedy(write, line, message):
    name = write("x.gin", f"Run.steps = 1\n{line}\n")
    assert message in refusal([name])


def test_mistakes_in_included_files_name_both(write):
    write("y.gin", "\n\nModel.emb_dims = 1\n")
    name = write("x.gin", "Run.steps = 1\ninclude 'y.gin'\n")
    assert "y.gin:3: Model has no field" in refusal([name])
    write("y.gin", "\nModel.emb_dim = ]\n")
    message = refusal([name])
    assert "y.gin:2: cannot be read as Gin" in message
    assert "(included at x.gin:2)" in message


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("Model.emb_dim=abc", "--gin.Model.emb_dim: Model.emb_dim must be an int, not 'abc'"),
        ("Modl.emb_dim=1", "--gin.Modl.emb_dim: unknown name 'Modl'. Did you mean 'Model'?"),
        ("Model.emb_dim", "write --gin.NAME.FIELD=VALUE"),
        ("=3", "write --gin.NAME.FIELD=VALUE"),
        ("Run.folder=@Model", "--gin.Run.folder: @Model: Gin files here set values only"),
        ("N=3", "--gin.N: the macro N is used nowhere"),
    ],
)
def test_mistakes_in_flags(binding, message):
    assert message in refusal(bindings=["Run.steps=1", binding])


def test_fields_without_a_value_are_named():
    assert "no value for Run.steps" in refusal()


def test_missing_file_lists_where_it_looked(write, tmp_path):
    message = refusal(["runs/none.gin"], search_paths=["extra"])
    for folder in (tmp_path, tmp_path / "extra", config.package_gin_folder()):
        assert str(folder.resolve()) in message


def test_search_order(write):
    write("extra/a.gin", "Run.steps = 1\n")
    write("more/a.gin", "Run.steps = 2\n")
    assert load(["a.gin"], search_paths=["extra", "more"])["Run"].steps == 1
    assert load(["a.gin"], search_paths=["more", "extra"])["Run"].steps == 2
    write("a.gin", "Run.steps = 3\n")
    assert load(["a.gin"], search_paths=["more", "extra"])["Run"].steps == 3


def test_files_of_the_package_are_found_from_anywhere(write, tmp_path, monkeypatch):
    write("shipped/gin/runs/b.gin", "include 'gin/models/m.gin'\nRun.steps = 2\n")
    write("shipped/gin/models/m.gin", "Model.emb_dim = 3\n")
    monkeypatch.setattr(config, "package_gin_folder", lambda: tmp_path / "shipped/gin")
    for name in ("runs/b.gin", "gin/runs/b.gin"):
        rooms = load([name])
        assert (rooms["Run"].steps, rooms["Model"].emb_dim) == (2, 3)
    assert "Did you mean 'runs/b.gin'?" in refusal(["gin/runs/bb.gin"])


def test_unreadable_file(write, tmp_path):
    (tmp_path / "bytes.gin").write_bytes(b"\xff\xfe")
    assert "cannot read bytes.gin" in refusal(["bytes.gin"])


def test_text_gives_the_same_configuration_again(write):
    rooms = load(
        bindings=[
            "Run.steps=3",
            'Run.folder=it\'s \\ "quoted" \n ünï',
            "Run.maximum=1e-05",
            f"Run.rates={ {f'task_number_{i}': i / 3 for i in range(20)} }",
            "Model.activations=('one',)",
        ]
    )
    text = config.config_text(rooms)
    again = load([write("again.gin", text)])
    assert again == rooms
    assert config.config_text(again) == text
    assert "Model.dropout_rate = 0.0\n" in text  # defaults are written too
    assert max(map(len, text.splitlines())) <= 100
    names = [line.split(" = ")[0] for line in text.splitlines() if " = " in line]
    assert names == sorted(names)


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: (
        st.lists(children, max_size=4)
        | st.lists(children, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5), children, max_size=4)
    ),
    max_leaves=12,
)


@given(literals)
def test_every_literal_survives_gin(value):
    text = f"value = {format_value(value)}\n"
    (statement,) = config_parser.ConfigParser(text, config._Delegate())
    assert statement.value == value
    assert type(statement.value) is type(value)


def test_not_a_number_is_refused():
    with pytest.raises(TypeError, match="cannot be written"):
        format_value(math.nan)


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, int | float, 1),
        (1.5, int | float, 1.5),
        ([1, 2], tuple[int, ...], (1, 2)),
        ((1, 2), list[int], [1, 2]),
        ([[1], []], Sequence[Sequence[int]], ((1,), ())),
        ([1, None], Sequence[int | None], (1, None)),
        ({"a": 1}, dict[str, float] | None, {"a": 1.0}),
    ],
)
def test_matching_values(value, annotation, expected):
    fits, stored = matched(value, annotation)
    assert fits
    assert stored == expected
    assert type(stored) is type(expected)


SHIPPED = config.package_gin_folder()
# Runs that are not for `mtl-jax train`.
COMMANDS = {"methods.gin": "compare", "leave_one_out.gin": "compare", "zero_shot.gin": "sweep"}


@pytest.mark.parametrize("path", sorted(SHIPPED.rglob("*.gin")), ids=lambda path: path.name)
def test_shipped_files_are_short_and_say_what_they_are(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("#")
    assert len([line for line in lines if line and not line.startswith("#")]) <= 25
    if path.parent.name == "runs":
        name = path.relative_to(SHIPPED).as_posix()
        command = COMMANDS.get(path.name, "train")
        assert f"mtl-jax {command} --gin_file=gin/{name}" in path.read_text()


TRAINED = [path for path in sorted(SHIPPED.glob("runs/*.gin")) if path.name not in COMMANDS]


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.name)
def test_shipped_runs_resolve_from_anywhere_and_round_trip(path, write):
    # Fine-tuning wants to be told what to start from.
    needed = ["Run.restore_from=runs/pretrain"] if path.name == "finetune.gin" else []
    resolved = config.load([f"runs/{path.name}"], needed)
    again = config.load([write("config.gin", resolved.text)])
    assert again == resolved


def test_a_comparison_is_told_from_a_run():
    with pytest.raises(UserError, match="the room Compare is for `mtl-jax compare`"):
        config.load(["runs/methods.gin"])


def test_all_rooms_have_their_place():
    resolved = config.load([])
    assert resolved.text.count("\n\n") == len(config.ROOMS)
    for name, (part, _, kind) in config.ROOMS.items():
        assert type(getattr(resolved, part)).__name__ == kind
        assert f"\n{name}." in resolved.text
