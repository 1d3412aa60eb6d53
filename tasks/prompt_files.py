"""Files of prompt templates, as entries: PromptSource's YAML, plain YAML, JSON lines.

An entry is a flat mapping with the fields of `FIELDS`; what it means is said in `prompts.Template`.
Files may come from strangers: YAML is read by a safe loader, which makes text, lists and
dictionaries only, and PromptSource's two tags are read as the plain mappings that they mark.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mtl_jax.errors import UserError, suggest

Entry = dict[str, Any]

FIELDS = ("dataset", "subset", "name", "jinja", "answer_choices", "reference")
METADATA = ("original_task", "choices_in_prompt", "metrics", "languages")
_UNUSED = ("id", "task_template")  # PromptSource's own; the second in a few old templates
_TEXTS = (*FIELDS, "id")
_SUFFIXES = (".yaml", ".yml", ".jsonl", ".jsonl.gz")
_TAGS = ("!Template", "!TemplateMetadata")
_SHAPE = "A template needs name and jinja, and may have answer_choices"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Only true, false and null are not text: `answer_choices: No` and a name of 1 stay text."""


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|false|False)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^(null|~|)$"), ["n", "~", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("^<<$"), ["<"])
for _tag in _TAGS:
    _Loader.add_constructor(_tag, lambda loader, node: loader.construct_mapping(node, deep=True))


def read_entries(path: str | Path) -> Iterator[Entry]:
    """Yields the templates of a file, or of all YAML files below a folder.

    The forms are those of docs/prompts.md. In a folder, a file that does not name its dataset
    belongs to the one that its place names, as in PromptSource's own tree:
    `DATASET/SUBSET/templates.yaml`.

    Raises:
        UserError: an unreadable file or malformed template; names the file and line or template.
    """
    path = Path(path)
    try:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in (".yaml", ".yml"))
            if not files:
                raise UserError(f"Cannot read the templates in {path}: it has no .yaml file.")
            for file in files:
                for entry in _read_yaml(file):
                    yield _placed(entry, file.relative_to(path))
        elif path.name.endswith((".yaml", ".yml")):
            yield from _read_yaml(path)
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _read_json_lines(path)
        else:
            raise UserError(
                f"Cannot read the templates in {path}: not a folder, and its name does not end "
                f"with {', '.join(_SUFFIXES)}."
            )
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"Cannot read the templates in {path}: {getattr(error, 'strerror', None) or error}."
            f"{'' if path.exists() else suggest(path.name, near)}"
        ) from error


def _placed(entry: Entry, place: Path) -> Entry:
    if entry.get("dataset"):
        return entry
    parts = place.parts[:-1] if place.stem == "templates" else (*place.parts[:-1], place.stem)
    return entry | {"dataset": "/".join(parts), "subset": None}


def label(entry: Mapping[str, Any]) -> str:
    """Returns `DATASET/SUBSET` or `DATASET`; empty where the file does not say."""
    return "/".join(entry[name] for name in ("dataset", "subset") if entry.get(name))


def _read_json_lines(path: Path) -> Iterator[Entry]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            try:
                found = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: not a template ({error}). {_SHAPE}.") from error
            except RecursionError as error:
                raise UserError(f"{where}: not a template, but nested without end.") from error
            yield _checked(found, where)


def _read_yaml(path: Path) -> Iterator[Entry]:
    try:
        loaded = yaml.load_all(path.read_text(encoding="utf-8"), _Loader)
        documents = [document for document in loaded if document is not None]
    except yaml.constructor.ConstructorError as error:
        where = f"{path}, line {error.problem_mark.line + 1}"
        if tag := re.search("tag '(.*)'", error.problem or ""):
            raise UserError(
                f"{where}: the tag {tag[1].replace('tag:yaml.org,2002:', '!!')!r} is refused; a "
                f"file of templates may have {' and '.join(_TAGS)}."
            ) from error
        raise UserError(f"{where}: {error.problem}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(
            f"{where}: not valid YAML ({problem}). Put text with ': ', '{{{{' or '#' in quotes or "
            "below `jinja: |`."
        ) from error
    for number, document in enumerate(documents, 1):
        where = str(path) if len(documents) == 1 else f"{path}, document {number}"
        yield from _entries(document, where)


def _entries(document: Any, where: str) -> Iterator[Entry]:
    """One YAML document: a list or mapping of templates, below `templates` or alone."""
    about: dict[str, Any] = {}
    if isinstance(document, Mapping) and "templates" in document:
        about = {name: document.get(name) for name in ("dataset", "subset")}
        odd = [name for name in document if name not in (*about, "templates")]
        if odd:
            raise UserError(
                f"{where}: the field {odd[0]!r} is unknown beside templates, dataset and subset."
                f"{suggest(str(odd[0]), about)}"
            )
        document = document["templates"]
    if isinstance(document, Mapping):
        # PromptSource's keys are ids, in a plain file they may be the names.
        for key, found in document.items():
            named = {"name": key, **found} if isinstance(found, Mapping) else found
            yield _checked(named, f"{where}, template {key!r}", about)
    elif isinstance(document, list):
        for number, found in enumerate(document, 1):
            yield _checked(found, f"{where}, template {number}", about)
    else:
        raise UserError(f"{where}: not a list or mapping of templates. {_SHAPE}.")


def _checked(found: Any, where: str, about: Mapping[str, Any] | None = None) -> Entry:
    """Makes one entry flat and checks the names and types of its fields."""
    if not isinstance(found, Mapping):
        raise UserError(f"{where}: not a template, but {found!r:.40}. {_SHAPE}.")
    metadata = found.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise UserError(f"{where}: metadata is {metadata!r:.40}, not a mapping.")
    entry = {**(about or {}), **{k: v for k, v in found.items() if k != "metadata"}, **metadata}
    known = (*FIELDS, *METADATA, *_UNUSED)
    for name, value in entry.items():
        if name not in known:
            raise UserError(
                f"{where}: the field {name!r} is unknown.{suggest(str(name), known)} "
                f"There are: {', '.join(known[2:-2])}."
            )
        _check_type(name, value, where)
    for name in ("name", "jinja"):
        if not entry.get(name):
            raise UserError(f"{where}: it has no {name}. {_SHAPE}.")
    return {name: value for name, value in entry.items() if name not in _UNUSED}


def _check_type(name: str, value: Any, where: str) -> None:
    if value is None or name == "task_template":
        return
    if name in _TEXTS:
        right, wanted = isinstance(value, str), "text; put it in quotes"
    elif name in ("metrics", "languages"):
        right = isinstance(value, list) and all(isinstance(item, str) for item in value)
        wanted = "a list of texts"
    else:
        right, wanted = isinstance(value, bool), "true or false"
    if not right:
        raise UserError(f"{where}: {name} is {value!r:.60}, but must be {wanted}.")
