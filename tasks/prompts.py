"""Prompt templates in PromptSource's format: Jinja text that turns a row into inputs and targets.

`|||` separates the input from the target; `answer_choices` is a second Jinja expression, rendered
for each row, that gives the answers a classifier may choose from (`yes ||| no`).

Differences from PromptSource (bigscience-workshop/promptsource, `templates.py`), all on purpose:
fields that a row lacks are errors instead of empty text, `choice` and `random` depend only on the
template and the row instead of on global random state, and text is never cut off.
"""

import dataclasses
import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import SandboxedEnvironment

from mtl_jax.errors import UserError, suggest

SEPARATOR = "|||"
# A row's own "|||" must not be taken for the separator: while rendering, it is written in
# characters of private use, and so is the first of these where a row has it.
_ESCAPE = "\ue000"
_ESCAPED_SEPARATOR, _ESCAPED_ESCAPE = _ESCAPE + "\ue001", _ESCAPE + "\ue002"
_RANDOM = "mtl_jax_random"
_HIDDEN_GLOBALS = ("lipsum", "cycler", "joiner")  # random or stateful: no use in a prompt


@dataclasses.dataclass(frozen=True)
class Rendered:
    """One prompted example. `choices` is empty for generation tasks."""

    inputs: str
    targets: str
    choices: list[str]


@jinja2.pass_context
def _choice(context: jinja2.runtime.Context, items: Sequence[Any]) -> Any:
    return context.resolve(_RANDOM).choice(list(items))


def _most_frequent(items: Sequence[Any]) -> list[Any] | None:
    """All items that occur most often, in the order of their first occurrence."""
    if not items:
        return None
    counts = Counter(items).most_common()
    return [item for item, count in counts if count == counts[0][1]]


def _make_environment() -> jinja2.Environment:
    # Not the immutable sandbox: templates do use `list.append`, and `render` hands them copies.
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, cache_size=0)
    environment.filters.update(
        choice=_choice, random=_choice, most_frequent=_most_frequent, zip=zip, highlight=str
    )
    environment.globals.update(most_frequent=_most_frequent, zip=zip, choice=_choice)
    for name in _HIDDEN_GLOBALS:
        environment.globals.pop(name, None)
    return environment


_ENVIRONMENT = _make_environment()


def _protect(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(_ESCAPE, _ESCAPED_ESCAPE).replace(SEPARATOR, _ESCAPED_SEPARATOR)
    if isinstance(value, Mapping):
        return {key: _protect(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_protect(item) for item in value]
    return value


def _split(text: str) -> list[str]:
    """Splits at the separators of the template, then puts the row's own ones back."""
    return [
        part.replace(_ESCAPED_SEPARATOR, SEPARATOR).replace(_ESCAPED_ESCAPE, _ESCAPE).strip()
        for part in text.split(SEPARATOR)
    ]


@dataclasses.dataclass(frozen=True)
class Template:
    """A named prompt.

    Attributes:
        name: unique within its dataset; part of the task's name.
        jinja: `input ||| target`.
        answer_choices: Jinja expression giving `a ||| b ||| c`; empty for generation.
        original_task: the prompt asks for what the dataset was made for (T0 evaluates only these).
        choices_in_prompt: the input itself names the choices.
        metrics: names of the metrics that PromptSource proposes.
        languages: codes of the languages of the prompt.

    Raises:
        UserError: the Jinja of the template cannot be parsed (names template and line).
    """

    name: str
    jinja: str
    answer_choices: str = ""
    original_task: bool = True
    choices_in_prompt: bool = False
    metrics: tuple[str, ...] = ()
    languages: tuple[str, ...] = ("en",)

    def __post_init__(self) -> None:
        compiled = {}
        for field in ("jinja", "answer_choices"):
            try:
                compiled[field] = _ENVIRONMENT.from_string(getattr(self, field) or "")
            except jinja2.TemplateSyntaxError as error:
                raise UserError(
                    f"Template {self.name!r}: {field} is no valid Jinja, line {error.lineno}: "
                    f"{error.message}."
                ) from error
        object.__setattr__(self, "_compiled", compiled)

    def render(self, row: Mapping[str, Any], row_name: str = "") -> Rendered | None:
        """Fills the template with the fields of one row.

        Args:
            row: field name to value (text, numbers, lists, nested mappings).
            row_name: how error messages call the row, e.g. `"train row 12"`.

        Returns:
            The example, or None when the template gives an empty input or an empty target for this
            row: PromptSource's way to skip rows that a prompt does not apply to.

        Raises:
            UserError: a variable is missing, an expression fails, or there is not exactly one
                `|||`; names the template, the row and the variable.
        """
        if "answer_choices" in row:
            raise UserError(
                f"Template {self.name!r}, {_describe_row(row, row_name)}: the field name "
                "'answer_choices' is reserved for the template's choices; rename the field."
            )
        values = _protect(row)
        values[_RANDOM] = _LazyRandom(self.name, row)
        choices: list[str] = []
        if self.answer_choices:
            text = self.answer_choices
            if "{" in text:  # most lists of choices are the same for every row
                text = self._render_part("answer_choices", values, row, row_name)
            choices = [choice for choice in _split(text) if choice]
            # Inside the template the choices are protected like every other text of the row.
            values["answer_choices"] = _protect(choices)
        else:
            values["answer_choices"] = None
        parts = _split(self._render_part("jinja", values, row, row_name))
        if len(parts) == 1 and not parts[0]:
            return None
        if len(parts) != 2:
            raise UserError(
                f"Template {self.name!r}, {_describe_row(row, row_name)}: found {len(parts) - 1} "
                f"separators '{SEPARATOR}', need exactly one between input and target."
            )
        inputs, targets = parts
        if not inputs or not targets:
            return None
        return Rendered(inputs, targets, choices)

    def _render_part(
        self, field: str, values: Mapping[str, Any], row: Mapping[str, Any], row_name: str
    ) -> str:
        try:
            return self._compiled[field].render(values)  # type: ignore[attr-defined]
        except Exception as error:  # template code may raise anything
            where = f"Template {self.name!r}, {_describe_row(row, row_name)}"
            raise UserError(f"{where}: {self._explain(field, row, error)}") from error

    def _explain(self, field: str, row: Mapping[str, Any], error: Exception) -> str:
        if isinstance(error, jinja2.UndefinedError):
            syntax = _ENVIRONMENT.parse(getattr(self, field))
            used = jinja2.meta.find_undeclared_variables(syntax)
            missing = sorted(
                name for name in used - set(row) - {"answer_choices"} if name in str(error)
            )
            if missing:
                return (
                    f"{field} uses the variable {missing[0]!r}, which the row lacks."
                    f"{suggest(missing[0], row)} The row has: {', '.join(map(str, row))}."
                )
            if "answer_choices" in used and not self.answer_choices:
                return f"{field} uses answer_choices, but the template has none."
            return f"{field}: {error}."
        if isinstance(error, jinja2.exceptions.SecurityError):
            return f"{field} reaches for something a prompt may not use: {error}."
        return f"{field} fails with {type(error).__name__}: {error}."


class _LazyRandom:
    """`random.Random` made on first use: few templates draw, and seeding is slow."""

    def __init__(self, template_name: str, row: Mapping[str, Any]):
        self._source = [template_name, row]
        self._random: random.Random | None = None

    def choice(self, items: list[Any]) -> Any:
        if self._random is None:
            seed = json.dumps(self._source, sort_keys=True, default=str)
            self._random = random.Random(hashlib.sha256(seed.encode()).digest())
        return self._random.choice(items)


def _describe_row(row: Mapping[str, Any], row_name: str) -> str:
    if row_name:
        return row_name
    text = repr(dict(row))
    return f"row {text if len(text) <= 120 else text[:117] + '...'}"


def _read_templates(path: Path) -> Iterator[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    entry = json.loads(line)
                    entry["dataset"], entry["name"], entry["jinja"]
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{path}, line {number}: not a template ({type(error).__name__}: {error}). "
                        "Each line is a JSON object with dataset, subset, name and jinja."
                    ) from error
                yield entry
    except (OSError, EOFError) as error:
        raise UserError(f"Cannot read the templates in {path}: {error}.") from error


def load_templates(
    path: str | Path,
    dataset: str,
    subset: str | None = None,
    names: Sequence[str] | None = None,
) -> list[Template]:
    """Reads the templates of one dataset from a PromptSource JSONL file (`.jsonl[.gz]`).

    Args:
        path: file with one template a line: `dataset, subset, name, jinja, answer_choices, ...`.
        dataset: e.g. `"super_glue"`.
        subset: e.g. `"cb"`; None for datasets without subsets.
        names: keep only these, in this order; None keeps all in the order of the file.

    Raises:
        UserError: unreadable file, malformed line, no such dataset, or no template of a given name.
    """
    templates: dict[str, Template] = {}
    known: set[tuple[str, str | None]] = set()
    for entry in _read_templates(Path(path)):
        known.add((entry["dataset"], entry.get("subset")))
        if (entry["dataset"], entry.get("subset")) == (dataset, subset):
            template = template_from_entry(entry)
            templates[template.name] = template
    if not templates:
        wanted = f"{dataset}/{subset}" if subset else dataset
        near = suggest(wanted, sorted(f"{d}/{s}" if s else d for d, s in known))
        raise UserError(f"{path} has no templates for {wanted!r}.{near}")
    if names is None:
        return list(templates.values())
    for name in names:
        if name not in templates:
            raise UserError(
                f"{path}: no template {name!r} for {dataset}.{suggest(name, templates)}"
            )
    return [templates[name] for name in names]


def template_from_entry(entry: Mapping[str, Any]) -> Template:
    """Makes a `Template` from one PromptSource entry (a line of the JSONL file)."""
    return Template(
        name=entry["name"],
        jinja=entry["jinja"],
        answer_choices=entry.get("answer_choices") or "",
        original_task=bool(entry.get("original_task")),
        choices_in_prompt=bool(entry.get("choices_in_prompt")),
        metrics=tuple(entry.get("metrics") or ()),
        languages=tuple(entry.get("languages") or ()),
    )
