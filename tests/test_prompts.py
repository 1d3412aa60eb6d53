"""Prompt templates: PromptSource's format, its own templates and T0's prompts on real rows."""

import gzip
import json
import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_jax.errors import UserError
from mtl_jax.tasks.prompts import Rendered, Template, load_templates, template_from_entry


def read_jsonl(path):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_input_target_and_choices_of_a_row():
    template = Template(
        "nli",
        "{{premise}} Does it follow that {{hypothesis}}? ||| {{ answer_choices[label] }}",
        "Yes ||| No ||| Maybe",
    )
    row = {"premise": "It rains.", "hypothesis": "it is wet", "label": 2}
    assert template.render(row) == Rendered(
        "It rains. Does it follow that it is wet?", "Maybe", ["Yes", "No", "Maybe"]
    )


def test_choices_are_rendered_for_each_row():
    template = Template("copa", "{{premise}} ||| {{ answer_choices[label] }}", "{{c1}} ||| {{c2}}")
    row = {"premise": "p", "c1": "left", "c2": "right", "label": 1}
    assert template.render(row) == Rendered("p", "right", ["left", "right"])


def test_an_empty_choice_is_refused_and_never_shifts_the_labels():
    template = Template(
        "quiz",
        "{% if label >= 0 %}Which? ||| {{ answer_choices[label] }}{% endif %}",
        "{{ options | join(' ||| ') }}",
    )
    row = {"options": ["", "a", "b"], "label": 1}
    message = r"'quiz', train row 7: answer choice 0 \(counted from 0\) is empty"
    with pytest.raises(UserError, match=message):
        template.render(row, "train row 7")
    assert template.render(row | {"label": -1}) is None  # a row that the prompt skips
    free = Template("free", "Which? ||| {{label}}", "{{ options | join(' ||| ') }}")
    assert free.render({"options": [], "label": 1}) == Rendered("Which?", "1", [])


def test_separator_inside_a_row_is_text():
    template = Template("t", "{{a}} ||| {{ answer_choices[0] }}", "{{a}} ||| {{b}}")
    row = {"a": "x ||| y", "b": "z"}
    assert template.render(row) == Rendered("x ||| y", "x ||| y", ["x ||| y", "z"])


@given(st.text(min_size=1), st.text(min_size=1))
@settings(deadline=None)
def test_text_of_a_row_arrives_unchanged_but_for_white_space_around_it(first, second):
    rendered = Template("t", "a: {{first}} ||| b: {{second}}").render(
        {"first": first, "second": second}
    )
    # Jinja itself normalises line ends in templates, never in values.
    assert rendered == Rendered(f"a: {first}".strip(), f"b: {second}".strip(), [])


@pytest.mark.parametrize(
    "jinja",
    [
        "{% if kind == 'effect' %}{{text}} ||| yes{% endif %}",  # neither input nor target
        "{{text}} ||| {% if label != -1 %}{{label}}{% endif %}",  # hidden label
        "{{empty}} ||| yes",
    ],
)
def test_empty_rendering_is_skipped(jinja):
    row = {"kind": "cause", "text": "it rains", "label": -1, "empty": " "}
    assert Template("t", jinja).render(row) is None


def test_promptsource_filters():
    row = {"names": ["x", "y", "z"], "votes": ["no", "yes", "yes", "no", "ok"]}
    zipped = Template("t", "{% for n, v in names | zip(votes) %}{{n}}={{v}} {% endfor %} ||| a")
    assert zipped.render(row).inputs == "x=no y=yes z=yes"
    frequent = Template("t", "{{ votes | most_frequent | join(',') }} ||| a")
    assert frequent.render(row).inputs == "no,yes"


def test_choice_depends_on_template_and_row_only():
    template = Template("t", "{{ words | choice }} ||| {{ words | random }}")
    rows = [{"words": list(string.ascii_letters), "row": number} for number in range(20)]
    random.seed(1)
    first = [template.render(row) for row in rows]
    random.seed(2)
    state = random.getstate()
    assert [template.render(row) for row in rows] == first
    assert random.getstate() == state
    assert len({rendered.inputs for rendered in first}) > 5
    other = Template("other", template.jinja)
    assert [other.render(row) for row in rows] != first


def test_templates_leave_the_row_as_it_is():
    row = {"items": ["a"]}
    template = Template("t", "{% set _ = items.append('b') %}{{ items | join }} ||| x")
    assert template.render(row).inputs == "ab"
    assert row == {"items": ["a"]}


def test_missing_variable_is_named_with_its_neighbours():
    template = Template("broken", "{{premis}} ||| yes")
    with pytest.raises(UserError) as error:
        template.render({"premise": "a", "label": 0}, "cb train row 7")
    message = str(error.value)
    for part in ("'broken'", "cb train row 7", "'premis'", "Did you mean 'premise'"):
        assert part in message


def test_what_a_filter_does_not_find_is_an_error_in_a_list_too():
    """Python writes the items of a list by their `repr`, where Jinja does not look."""
    made = Template("t", "{{ [q] | map(attribute='typo') | list }} ||| x")
    with pytest.raises(UserError, match=r"'t', row 3: jinja: .*'typo'"):
        made.render({"q": {"text": "a"}}, "row 3")


@pytest.mark.parametrize(
    ("jinja", "expected"),
    [
        ("{{ a.b.c }} ||| x", "has no attribute"),
        ("{{ 1 / zero }} ||| x", "ZeroDivisionError"),
        ("no separator", "found 0 separators"),
        ("a ||| b ||| c", "found 2 separators"),
        ("{{ answer_choices[0] }} ||| x", "answer_choices"),
    ],
)
def test_failing_template_names_template_and_row(jinja, expected):
    with pytest.raises(UserError, match="'t', row 3: ") as error:
        Template("t", jinja).render({"a": {}, "zero": 0}, "row 3")
    assert expected in str(error.value)


def test_syntax_error_names_template_and_line():
    with pytest.raises(UserError, match=r"'t': jinja is no valid Jinja, line 2"):
        Template("t", "a\n{% if %} ||| b")
    with pytest.raises(UserError, match=r"'t': answer_choices is no valid Jinja, line 1"):
        Template("t", "a ||| b", "{{ x ||| y")


def test_reserved_field_is_refused():
    with pytest.raises(UserError, match="'answer_choices' is reserved"):
        Template("t", "a ||| b").render({"answer_choices": ["x"]})


@pytest.mark.data
def test_all_templates_of_promptsource_parse(data_folder):
    entries = read_jsonl(data_folder / "promptsource" / "templates.jsonl.gz")
    templates = [template_from_entry(entry) for entry in entries]
    assert len(templates) == 2085
    assert sum(bool(template.answer_choices) for template in templates) > 1000


# Rows of the validation set, prompts, and prompts that apply to a part of the rows only.
T0_SETS = {"cb": (56, 15, 0), "rte": (277, 10, 0), "copa": (100, 12, 4), "wic": (638, 10, 0)}


@pytest.mark.data
@pytest.mark.parametrize("subset", T0_SETS)
def test_t0_prompts_render_on_all_validation_rows(data_folder, subset):
    num_rows, num_prompts, num_partial = T0_SETS[subset]
    folder = data_folder / "promptsource"
    lists = json.loads((folder / "t0_eval_prompts.json").read_text())
    [names] = [x["prompts"] for x in lists if (x["dataset"], x["subset"]) == ("super_glue", subset)]
    templates = load_templates(folder / "templates.jsonl.gz", "super_glue", subset, names)
    path = data_folder / "glue_superglue" / f"super_glue.{subset}" / "validation.jsonl.gz"
    rows = read_jsonl(path)
    assert (len(rows), len(templates)) == (num_rows, num_prompts)
    partial = 0
    for template in templates:
        rendered = [example for example in map(template.render, rows) if example is not None]
        assert all(example.targets in example.choices for example in rendered), template.name
        if len(rendered) < len(rows):
            partial += 1
            assert 0.4 * len(rows) <= len(rendered) <= 0.6 * len(rows), template.name
    assert partial == num_partial


# The other sets of the data folder that have PromptSource's fields, by the names of PromptSource.
OTHER_SETS = {
    "ag_news": ("ag_news", "validation", 7),
    "glue/mnli": ("glue.mnli", "validation", 15),
    "glue/qqp": ("glue.qqp", "validation", 6),
    "glue/sst2": ("glue.sst2", "validation", 5),
    "imdb": ("imdb", "train", 11),
    "super_glue/boolq": ("super_glue.boolq", "validation", 10),
    "yelp_review_full": ("yelp_review_full", "train", 7),
}


# Its target is a choice and more: "negative review."
CONTINUING = {"Negation template for positive and negative"}


@pytest.mark.data
@pytest.mark.parametrize("dataset", OTHER_SETS)
def test_templates_of_other_sets_render(data_folder, dataset):
    folder, split, num_templates = OTHER_SETS[dataset]
    templates = load_templates(data_folder / "promptsource" / "templates.jsonl.gz", dataset)
    assert len(templates) == num_templates
    rows = read_jsonl(data_folder / "glue_superglue" / folder / f"{split}.jsonl.gz")[:100]
    for template in templates:
        rendered = [example for example in map(template.render, rows) if example is not None]
        assert rendered, template.name
        if template.name not in CONTINUING:
            assert all(r.targets in r.choices for r in rendered if r.choices), template.name
