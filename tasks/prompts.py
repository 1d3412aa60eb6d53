"""Prompt templates in PromptSource's format: Jinja text that turns a row into inputs and targets.

`|||` separates the input from the target; `answer_choices` is a second Jinja expression, rendered
for each row, that gives the answers a classifier may choose from (`yes ||| no`).

Differences from PromptSource (bigscience-workshop/promptsource, `templates.py`), all on purpose:
fields that a row lacks are errors instead of empty text, `choice` and `random` depend only on the
template and the row instead of on global random state, text is never cut off, and templates work
within the limits of `sandbox`.
"""

import dataclasses
import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta

from mtl_jax.errors import UserError, suggest
from mtl_jax.tasks import sandbox
from mtl_jax.tasks.prompt_files import label, read_entries

SEPARATOR = "|||"
# A row's own "|||" must not be taken for the separator: while rendering, it is written in
# characters of private use, and so is the first of these where a row has it.
_ESCAPE = "\ue000"
_ESCAPED_SEPARATOR, _ESCAPED_ESCAPE = _ESCAPE + "\ue001", _ESCAPE + "\ue002"


@dataclasses.dataclass(frozen=True)
class Rendered:
    """One prompted example. `choices` is empty for generation tasks."""

    inputs: str
    targets: str
    choices: list[str]


def _protect(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(_ESCAPE, _ESCAPED_ESCAPE).replace(SEPARATOR, _ESCAPED_SEPARATOR)
    if value is None or isinstance(value, (int, float)):  # the usual; other checks are slow
        return value
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
        reference: where the wording comes from.

    Raises:
        UserError: the Jinja of the template cannot be compiled (names template and line).
    """

    name: str
    jinja: str
    answer_choices: str = ""
    original_task: bool = True
    choices_in_prompt: bool = False
    metrics: tuple[str, ...] = ()
    languages: tuple[str, ...] = ("en",)
    reference: str = ""

    def __post_init__(self) -> None:
        compiled = {}
        for field in ("jinja", "answer_choices"):
            text = getattr(self, field)
            if field == "answer_choices" and "{" not in text:  # compiling takes milliseconds
                continue
            try:
                with sandbox.allowance():
                    compiled[field] = sandbox.ENVIRONMENT.from_string(text)
            except jinja2.TemplateSyntaxError as error:
                raise UserError(
                    f"Template {self.name!r}: {field} is no valid Jinja, line {error.lineno}: "
                    f"{(error.message or '').rstrip('.')}."
                ) from error
            except Exception as error:  # nested too deep, a constant that cannot be computed
                raise UserError(
                    f"Template {self.name!r}: {field} cannot be compiled: "
                    f"{type(error).__name__}: {error}."
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
            UserError: a variable is missing, an expression fails, there is not exactly one `|||`,
                or one of several choices is empty; names the template, the row and the variable or
                the number of the choice.
        """
        if "answer_choices" in row:
            raise UserError(
                f"Template {self.name!r}, {_describe_row(row, row_name)}: the field name "
                "'answer_choices' is reserved for the template's choices; rename the field."
            )
        values = _protect(row)
        chooser = _LazyRandom(self.name, row)
        choices: list[str] = []
        if self.answer_choices:
            text = self.answer_choices
            if "{" in text:  # most lists of choices are the same for every row
                text = self._render_part("answer_choices", values, row, row_name, chooser)
            choices = _split(text)
            if choices == [""]:
                choices = []
            # Inside the template the choices are protected like every other text of the row.
            values["answer_choices"] = _protect(choices)
        else:
            values["answer_choices"] = None
        parts = _split(self._render_part("jinja", values, row, row_name, chooser))
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
        if "" in choices:  # only here, for a row that is skipped may lack what choices are made of
            raise UserError(
                f"Template {self.name!r}, {_describe_row(row, row_name)}: answer choice "
                f"{choices.index('')} (counted from 0) is empty; leaving it out would give the "
                "choices behind it other labels. Guard the row or write something for it."
            )
        return Rendered(inputs, targets, choices)

    def _render_part(
        self,
        field: str,
        values: Mapping[str, Any],
        row: Mapping[str, Any],
        row_name: str,
        chooser: "_LazyRandom",
    ) -> str:
        try:
            with sandbox.allowance(chooser):
                return self._compiled[field].render(values)  # type: ignore[attr-defined]
        except Exception as error:  # template code may raise anything
            where = f"Template {self.name!r}, {_describe_row(row, row_name)}"
            raise UserError(f"{where}: {self._explain(field, row, error)}") from error

    def _explain(self, field: str, row: Mapping[str, Any], error: Exception) -> str:
        if isinstance(error, jinja2.UndefinedError):
            syntax = sandbox.ENVIRONMENT.parse(getattr(self, field))
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
        if isinstance(error, sandbox.TooMuchWork):
            return f"{field} asks for {error}."
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


def prompt_slug(name: str) -> str:
    """Turns a prompt's name into a part of a task's name: `"GPT-3 style"` -> `"gpt_3_style"`."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "_", plain.lower()).strip("_") or "prompt"


def _describe_row(row: Mapping[str, Any], row_name: str) -> str:
    if row_name:
        return row_name
    text = repr(dict(row))
    return f"row {text if len(text) <= 120 else text[:117] + '...'}"


def load_templates(
    path: str | Path,
    dataset: str = "",
    subset: str | None = None,
    names: Sequence[str] | None = None,
) -> list[Template]:
    """Reads the templates of one dataset from a file, or from a folder of YAML files.

    Args:
        path: `.yaml` (PromptSource's or plain, see docs/prompts.md), `.jsonl[.gz]` with one
            template a line, or a folder such as PromptSource's `templates/`.
        dataset: e.g. `"super_glue"`; empty: the only one that the file has. Templates of a file
            that names no dataset belong to any.
        subset: e.g. `"cb"`; None for datasets without subsets, or with the subset in `dataset`
            (`"super_glue/cb"`).
        names: keep only these, in this order; None keeps all in the order of the file.

    Raises:
        UserError: unreadable file, malformed template, no such dataset, two templates of one name,
            or no template of a given name.
    """
    wanted = f"{dataset}/{subset}" if subset else dataset
    entries = list(read_entries(_narrowed(Path(path), wanted)))
    datasets = dict.fromkeys(map(label, entries))
    if not wanted and len(datasets) > 1:
        shown = [name or "one without a name" for name in datasets]
        raise UserError(
            f"{path} has templates of {len(shown)} datasets; say which: {_listed(shown)}."
        )
    templates: dict[str, Template] = {}
    for entry in entries:
        if wanted and label(entry) not in (wanted, ""):
            continue
        template = template_from_entry(entry)
        if template.name in templates:
            raise UserError(f"{path} has two templates of the name {template.name!r} for {wanted}.")
        templates[template.name] = template
    if not templates:
        near = suggest(wanted, sorted(datasets))
        raise UserError(f"{path} has no templates for {wanted!r}.{near}")
    return [
        find_template(templates, name, str(path))
        for name in (templates if names is None else names)
    ]


def _narrowed(path: Path, dataset: str) -> Path:
    """Of PromptSource's tree only the file of the dataset: reading all takes seconds."""
    place = path / dataset
    return place if dataset and (place / "templates.yaml").is_file() else path


def find_template(templates: Mapping[str, Template], name: str, where: str) -> Template:
    """Returns the template of a name, or of a name that differs in case and punctuation only.

    Raises:
        UserError: there is none; names the nearest ones.
    """
    if name in templates:
        return templates[name]
    alike = [each for each in templates if prompt_slug(each) == prompt_slug(name)]
    if len(alike) == 1:
        return templates[alike[0]]
    raise UserError(
        f"{where}: no template {name!r}.{suggest(name, templates)} There are: "
        f"{_listed(list(templates))}."
    )


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def template_from_entry(entry: Mapping[str, Any]) -> Template:
    """Makes a `Template` from one entry of a file: a flat mapping, named as `Template` is.

    Metadata that the entry lacks has the defaults of `Template`; null means "not so".
    """
    metadata: dict[str, Any] = {
        name: bool(entry[name]) for name in ("original_task", "choices_in_prompt") if name in entry
    }
    metadata |= {
        name: tuple(entry[name] or ()) for name in ("metrics", "languages") if name in entry
    }
    return Template(
        name=entry["name"],
        jinja=entry["jinja"],
        answer_choices=entry.get("answer_choices") or "",
        reference=entry.get("reference") or "",
        **metadata,
    )
