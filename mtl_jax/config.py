"""Gin files and flags to checked configuration dataclasses.

The language is gin-config's own (its parser reads the files); the meaning is narrower: a file sets
values of the fields of the dataclasses in `ROOMS`, nothing else. Every value is checked against the
field's annotation, and every mistake names its file and line. Nothing is registered anywhere, so
any number of configurations can be loaded in one process.

    include 'models/t5_tiny.gin'     # searched as described at `find_file`
    STEPS = 1000                     # a macro: used as %STEPS, the last definition holds
    Run.steps = %STEPS               # a later value replaces an earlier one
    Data:                            # gin's block form
      batch_size = 32
"""

import dataclasses
import importlib
import re
import tokenize
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gin import config_parser

from mtl_jax.config_types import format_value, is_text_type, matched, type_name
from mtl_jax.errors import UserError, suggest

if TYPE_CHECKING:
    import argparse

    from mtl_jax.balance.balance_config import BalanceConfig
    from mtl_jax.balance.method import Method
    from mtl_jax.checkpoint_config import CheckpointConfig
    from mtl_jax.data_config import DataConfig, MixtureConfig
    from mtl_jax.eval_task import EvalConfig
    from mtl_jax.guard_config import GuardConfig
    from mtl_jax.model_config import T5Config
    from mtl_jax.objective import StepConfig
    from mtl_jax.optim import OptimizerConfig
    from mtl_jax.run_config import RunConfig
    from mtl_jax.sharding import MeshConfig
    from mtl_jax.sharing import sharing_config

# Gin name -> (field of Config, module, dataclass). Imported when a configuration is loaded, so that
# the command line answers at once.
ROOMS = {
    "T5": ("model", "mtl_jax.model_config", "T5Config"),
    "Data": ("data", "mtl_jax.data_config", "DataConfig"),
    "Mixture": ("mixture", "mtl_jax.data_config", "MixtureConfig"),
    "Optimizer": ("optimizer", "mtl_jax.optim", "OptimizerConfig"),
    "Mesh": ("mesh", "mtl_jax.sharding", "MeshConfig"),
    "Step": ("step", "mtl_jax.objective", "StepConfig"),
    "Balance": ("balance", "mtl_jax.balance.balance_config", "BalanceConfig"),
    "Sharing": ("sharing", "mtl_jax.sharing.sharing_config", "SharingConfig"),
    "Lora": ("lora", "mtl_jax.sharing.sharing_config", "LoraConfig"),
    "Adapter": ("adapter", "mtl_jax.sharing.sharing_config", "AdapterConfig"),
    "Prompt": ("prompt", "mtl_jax.sharing.sharing_config", "PromptConfig"),
    "Experts": ("experts", "mtl_jax.sharing.sharing_config", "ExpertsConfig"),
    "Adversary": ("adversary", "mtl_jax.sharing.sharing_config", "AdversaryConfig"),
    "Guard": ("guard", "mtl_jax.guard_config", "GuardConfig"),
    "Run": ("run", "mtl_jax.run_config", "RunConfig"),
    "Checkpoint": ("checkpoint", "mtl_jax.checkpoint_config", "CheckpointConfig"),
    "Eval": ("eval", "mtl_jax.eval_task", "EvalConfig"),
}

HEADER = "# The complete configuration of a run. Load it again with --gin_file.\n"


@dataclasses.dataclass(frozen=True)
class Config:
    """One resolved configuration; `text` is the Gin file that gives it again.

    `method` is that of `Balance.method`, with its own fields; None: none is chosen.
    """

    model: "T5Config"
    data: "DataConfig"
    mixture: "MixtureConfig"
    optimizer: "OptimizerConfig"
    mesh: "MeshConfig"
    step: "StepConfig"
    balance: "BalanceConfig"
    method: "Method | None"
    sharing: "sharing_config.SharingConfig"
    lora: "sharing_config.LoraConfig"
    adapter: "sharing_config.AdapterConfig"
    prompt: "sharing_config.PromptConfig"
    experts: "sharing_config.ExpertsConfig"
    adversary: "sharing_config.AdversaryConfig"
    guard: "GuardConfig"
    run: "RunConfig"
    checkpoint: "CheckpointConfig"
    eval: "EvalConfig"
    text: str


@dataclasses.dataclass(frozen=True)
class _Macro:
    name: str


@dataclasses.dataclass(frozen=True)
class _Reference:
    name: str


@dataclasses.dataclass(frozen=True)
class _Word:
    """A value of the command line: what it reads as, and its text, for fields that want text."""

    value: Any
    text: str


@dataclasses.dataclass(frozen=True)
class Binding:
    """`name.field = value` (field "": a macro) and the place where it is written."""

    name: str
    field: str
    value: Any
    place: str


class _Delegate(config_parser.ParserDelegate):
    """Keeps references and macros as marks, to be judged where file and line are known."""

    def configurable_reference(self, name: str, evaluate: bool) -> _Reference:
        return _Reference(name)

    def macro(self, name: str) -> _Macro:
        return _Macro(name)


def package_gin_folder() -> Path:
    """Returns the folder of the Gin files that ship with the package (wheel or checkout)."""
    package = Path(__file__).parent
    installed = package / "gin"
    return installed if installed.is_dir() else package.parent / "gin"


def find_file(name: str, search_paths: Sequence[str] = (), beside: Path | None = None) -> Path:
    """Returns the Gin file `name`.

    Searched in: the folder `beside` (of the including file), the working directory, `search_paths`
    in order, the package's own folder. A leading `gin/` may be left out or written for the last.

    Raises:
        UserError: there is none; the message lists where it was sought.
    """
    shipped = package_gin_folder()
    roots = [beside] if beside else []
    roots += [Path(), *map(Path, search_paths), shipped, shipped.parent]
    candidates = [root / name for root in roots]
    if name.startswith("gin/"):
        candidates.append(shipped / name.removeprefix("gin/"))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    near = [path.relative_to(shipped).as_posix() for path in sorted(shipped.rglob("*.gin"))]
    looked = list(dict.fromkeys(str((root or Path()).resolve()) for root in roots[:-1]))
    hint = suggest(name.removeprefix("gin/"), near)
    raise UserError(f"no Gin file {name!r}; looked in {', '.join(looked)}.{hint}")


def _statements(text: str, place: str) -> Iterator[Any]:
    """Yields gin's statements; syntax errors become UserErrors at their line of `place`."""
    try:
        yield from config_parser.ConfigParser(text, _Delegate())
    except SyntaxError as error:
        line = error.lineno or 1
        reason = str(error.msg).replace("\n    ", ": ").split("\n", 1)[0]
        raise UserError(f"{place}:{line}: cannot be read as Gin: {reason}") from error
    except tokenize.TokenError as error:
        reason, (line, _) = error.args
        raise UserError(f"{place}:{line}: cannot be read as Gin: {reason}") from error


def read_file(
    name: str,
    search_paths: Sequence[str],
    beside: Path | None = None,
    parents: tuple[Path, ...] = (),
) -> list[Binding]:
    """Returns the bindings of a Gin file and of the files it includes, in their order.

    Raises:
        UserError: a file is missing, unreadable, malformed, includes itself, or imports.
    """
    path = find_file(name, search_paths, beside)
    if path.resolve() in parents:
        raise UserError(f"{path} includes itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    bindings = []
    for statement in _statements(text, str(path)):
        place = f"{path}:{statement.location.line_num}"
        if isinstance(statement, config_parser.IncludeStatement):
            family = (*parents, path.resolve())
            try:
                bindings += read_file(statement.filename, search_paths, path.parent, family)
            except UserError as error:
                raise UserError(f"{error} (included at {place})") from error
        elif isinstance(statement, config_parser.ImportStatement):
            raise UserError(
                f"{place}: Gin files here set values only; imports have no meaning. "
                "Name modules with tasks in Data.task_modules."
            )
        elif isinstance(statement, config_parser.BindingStatement):
            bindings.append(_binding(statement, place))
        elif statement.scope:  # the head of a block; its lines follow as bindings
            raise UserError(f"{place}: scopes ({statement.scope}/...) are not supported")
    return bindings


def _binding(statement: config_parser.BindingStatement, place: str) -> Binding:
    if statement.scope:
        raise UserError(f"{place}: scopes ({statement.scope}/...) are not supported")
    return Binding(statement.selector, statement.arg_name, statement.value, place)


def parse_binding(text: str) -> Binding:
    """Returns the binding of a flag `--gin.NAME=VALUE`, given as "NAME=VALUE".

    A value that is no literal is taken as text, so that nothing needs quotes:
    `Run.directory=runs/a`.

    Raises:
        UserError: there is no "=" or no name before it.
    """
    key, equals, value = text.partition("=")
    place = f"--gin.{key}"
    if not equals or not all(part.isidentifier() for part in key.split(".")):
        raise UserError(f"--gin.{text}: write --gin.NAME.FIELD=VALUE or --gin.MACRO=VALUE")
    name, _, field = key.rpartition(".") if "." in key else (key, "", "")
    try:
        # One statement and no more: "1\nT5.x = 2" is text.
        (statement,) = _statements(f"value = {value.strip()}\n", place)
        read = statement.value
    except (UserError, ValueError):
        read = value
    return Binding(name, field, _Word(read, value), place)


def _resolve(value: Any, macros: Mapping[str, Binding], place: str, active: tuple = ()) -> Any:
    """Replaces macros by their values, in containers too; refuses references."""
    if isinstance(value, _Reference):
        raise UserError(f"{place}: @{value.name}: Gin files here set values only, no @references")
    if isinstance(value, _Macro):
        if value.name not in macros:
            raise UserError(f"{place}: %{value.name} is not defined.{suggest(value.name, macros)}")
        if value.name in active:
            chain = " -> ".join(f"%{name}" for name in (*active, value.name))
            raise UserError(f"{place}: a macro is defined by itself: {chain}")
        macro = macros[value.name]
        return _resolve(macro.value, macros, macro.place, (*active, value.name))
    if isinstance(value, _Word):
        inner = _resolve(value.value, macros, place, active)
        return inner if isinstance(inner, _Word) else _Word(inner, value.text)
    if isinstance(value, dict):
        pairs = _resolve([pair for item in value.items() for pair in item], macros, place, active)
        return dict(zip(pairs[::2], pairs[1::2], strict=True))
    if isinstance(value, list | tuple):
        items = [_resolve(item, macros, place, active) for item in value]
        return type(value)(item.value if isinstance(item, _Word) else item for item in items)
    return value


def _mentions(value: Any) -> Iterator[str]:
    """Yields the names of the macros in a value."""
    if isinstance(value, _Macro):
        yield value.name
    elif isinstance(value, _Word):
        yield from _mentions(value.value)
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _mentions(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _mentions(item)


def _check_name(binding: Binding, types: Mapping[str, type]) -> None:
    """Refuses names and fields that do not exist."""
    if binding.name not in types:
        if binding.name in ("Compare", "Sweep"):
            command = f"`mtl-jax {binding.name.lower()}`"
            raise UserError(f"{binding.place}: the room {binding.name} is for {command}.")
        known = ", ".join(sorted(types))
        raise UserError(
            f"{binding.place}: unknown name {binding.name!r}."
            f"{suggest(binding.name, types)} Known: {known}."
        )
    fields = [field.name for field in dataclasses.fields(types[binding.name]) if field.init]
    if binding.field not in fields:
        raise UserError(
            f"{binding.place}: {binding.name} has no field {binding.field!r}."
            f"{suggest(binding.field, fields)} Fields: {', '.join(sorted(fields))}."
        )


def _checked_value(binding: Binding, value: Any, annotation: Any) -> Any:
    """Returns the value as the field's type wants it; UserError when it cannot be."""
    plain = value.value if isinstance(value, _Word) else value
    fits, result = matched(plain, annotation)
    if not fits and isinstance(value, _Word) and is_text_type(annotation):
        fits, result = True, value.text
    if not fits:
        kind = "None" if plain is None else f"{plain!r} ({type(plain).__name__})"
        raise UserError(
            f"{binding.place}: {binding.name}.{binding.field} must be "
            f"{type_name(annotation)}, not {kind}"
        )
    return result


def resolve(
    bindings: Iterable[Binding], types: Mapping[str, type], *, some: bool = False
) -> dict[str, Any]:
    """Returns one instance of each dataclass of `types`, by its Gin name.

    Args:
        bindings: in order; a later one replaces an earlier one of the same field or macro.
        types: dataclasses by Gin name.
        some: there are other bindings, so that a macro may seem to be used nowhere.

    Raises:
        UserError: unknown names and fields, wrong types, references, undefined or unused macros,
            fields without a value.
    """
    macros: dict[str, Binding] = {}
    values: dict[str, dict[str, Any]] = {name: {} for name in types}
    places: dict[str, dict[str, str]] = {name: {} for name in types}
    fields: dict[tuple[str, str], Binding] = {}
    mentioned: set[str] = set()
    for binding in bindings:
        mentioned.update(_mentions(binding.value))
        if binding.field:
            _check_name(binding, types)
            fields[binding.name, binding.field] = binding
        elif binding.name in types:
            raise UserError(
                f"{binding.place}: {binding.name} has fields: write {binding.name}.FIELD"
            )
        else:
            macros[binding.name] = binding
    for binding in fields.values():
        value = _resolve(binding.value, macros, binding.place)
        annotation = _annotations(types[binding.name])[binding.field]
        values[binding.name][binding.field] = _checked_value(binding, value, annotation)
        places[binding.name][binding.field] = binding.place
    for name, macro in macros.items():
        if name not in mentioned and not some:
            near = suggest(name, mentioned | {*types})
            raise UserError(f"{macro.place}: the macro {name} is used nowhere.{near}")
    return {name: _build(name, types[name], values[name], places[name]) for name in types}


def _annotations(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _build(name: str, kind: type, values: Mapping[str, Any], places: Mapping[str, str]) -> Any:
    """Makes the dataclass; says which fields lack a value, and where those it refuses were set."""
    missing = [
        f"{name}.{field.name}"
        for field in dataclasses.fields(kind)
        if field.init
        and field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"no value for {', '.join(missing)}: set it in a Gin file or with --gin.")
    try:
        return kind(**values)
    except (UserError, ValueError, TypeError) as error:
        reason = str(error) if isinstance(error, UserError) else f"{name}: {error}"
        words = set(re.findall(r"\w+", reason))
        culprits = [f"{name}.{field} at {places[field]}" for field in values if field in words]
        if culprits:
            reason += f" (set: {', '.join(culprits)})"
        raise UserError(reason) from error


def config_text(rooms: Mapping[str, Any]) -> str:
    """Returns the Gin file that sets every field of the given dataclass instances, sorted."""
    sections = []
    for name in sorted(rooms):
        lines = [
            f"{name}.{field.name} = {format_value(getattr(rooms[name], field.name))}"
            for field in sorted(dataclasses.fields(rooms[name]), key=lambda field: field.name)
            if field.init
        ]
        sections.append("\n".join(lines) + "\n")
    return HEADER + "\n" + "\n".join(sections)


def rates_text(rates: Mapping[str, float]) -> str:
    """Returns a Gin file that makes a mixture of tasks at these rates, for another run."""
    values = {
        "Mixture.name": "found_rates",
        "Mixture.tasks": tuple(rates),
        "Mixture.rates": rates,
        "Data.mixture": "found_rates",
    }
    head = "# Rates that a method found; put --gin_file=THIS_FILE after the files of another run.\n"
    return head + "".join(f"{name} = {format_value(value)}\n" for name, value in values.items())


def read_bindings(
    gin_files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
) -> list[Binding]:
    """Returns all bindings of Gin files and flags in their order; a later one replaces an earlier.

    Args:
        gin_files: names for `find_file`.
        bindings: texts "NAME.FIELD=VALUE" (see `parse_binding`); they replace those of files.
        search_paths: folders where Gin files and includes are sought.

    Raises:
        UserError: a file or flag that cannot be read.
    """
    given: list[Binding] = []
    for name in gin_files:
        given += read_file(name, search_paths)
    return given + list(map(parse_binding, bindings))


def load_rooms(
    gin_files: Sequence[str],
    bindings: Sequence[str],
    search_paths: Sequence[str],
    types: Mapping[str, type],
) -> dict[str, Any]:
    """Returns one instance of each dataclass of `types`, by its Gin name; see `read_bindings`."""
    return resolve(read_bindings(gin_files, bindings, search_paths), types)


def room_types() -> dict[str, type]:
    """Returns the dataclasses of `ROOMS` by Gin name (imports their modules)."""
    return {name: getattr(importlib.import_module(m), c) for name, (_, m, c) in ROOMS.items()}


def _method_types(given: Sequence[Binding], types: Mapping[str, type]) -> dict[str, type]:
    """Returns the room of the chosen method, whose name is known when Balance is.

    Raises:
        UserError: a mistake in Balance, or fields of a method that is not chosen.
    """
    from mtl_jax.balance.method import METHODS

    own = [b for b in given if b.name == "Balance" or (not b.field and b.name not in types)]
    balance = resolve(own, {"Balance": types["Balance"]}, some=True)["Balance"]
    for binding in given:
        if binding.field and binding.name in METHODS and binding.name != balance.method:
            raise UserError(
                f"{binding.place}: {binding.name}.{binding.field} is a field of a method that is "
                f"not chosen: set Balance.method = {binding.name!r}, or remove it."
            )
    return {balance.method: METHODS[balance.method]} if balance.method else {}


def load(
    gin_files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = ()
) -> Config:
    """Returns the whole configuration; see `read_bindings` and `resolve`."""
    return from_bindings(read_bindings(gin_files, bindings, search_paths))


def from_bindings(
    given: Sequence[Binding], *, also: Mapping[str, type] | None = None, some: bool = False
) -> Config:
    """Returns the whole configuration of bindings in their order; see `resolve`.

    Args:
        given: bindings.
        also: dataclasses of other rooms that may be among them, by Gin name.
        some: there are other bindings, so that a macro may seem to be used nowhere.
    """
    types = room_types()
    of_method = _method_types(given, types)
    rooms = resolve(given, types | of_method | dict(also or {}), some=some)
    parts = {ROOMS[name][0]: value for name, value in rooms.items() if name in ROOMS}
    method = next((rooms[name] for name in of_method), None)
    ours = {name: room for name, room in rooms.items() if name not in (also or {})}
    return Config(**parts, method=method, text=config_text(ours))


def load_args(args: "argparse.Namespace") -> Config:
    """Returns the configuration of parsed command-line flags (`cli.add_config_flags`)."""
    return load(args.gin_file, args.gin_bindings, args.gin_search_paths)
