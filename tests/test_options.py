"""Choices written into the input: the text of each style, the order that is drawn, what is refused.

The expected text of FLAN's style is that of its `format_options`: `OPTIONS:` and a line with a dash
for each option.
"""

import pytest
import seqio

from mtl_jax.errors import UserError
from mtl_jax.tasks.options import with_options
from mtl_jax.tasks.prompted import PromptedTask
from mtl_jax.tasks.prompts import Template

TEMPLATE = Template("fine?", "{{text}} ||| {{answer_choices[label]}}", "good ||| bad ||| so so")
ROW = {"text": "Is it good?", "label": 1}


@pytest.mark.parametrize(
    ("style", "inputs", "targets", "choices"),
    [
        ("none", "Is it good?", "bad", ["good", "bad", "so so"]),
        ("flan", "Is it good?\nOPTIONS:\n- good\n- bad\n- so so", "bad", ["good", "bad", "so so"]),
        (
            "letters",
            "Is it good?\nOPTIONS:\n(A) good\n(B) bad\n(C) so so",
            "bad",
            ["good", "bad", "so so"],
        ),
        (
            "letters_only",
            "Is it good?\nOPTIONS:\n(A) good\n(B) bad\n(C) so so",
            "(B)",
            ["(A)", "(B)", "(C)"],
        ),
    ],
)
def test_styles(style, inputs, targets, choices):
    template = with_options(TEMPLATE, style)
    rendered = template.render(ROW)
    assert (rendered.inputs, rendered.targets, rendered.choices) == (inputs, targets, choices)
    assert template.choices_in_prompt == (style != "none")


def test_shuffled_options_keep_the_meaning_of_letters():
    """Every order occurs, a row always has the same one, a letter is that of the right text."""
    texts = with_options(TEMPLATE, "letters", shuffled=True)
    letters = with_options(TEMPLATE, "letters_only", shuffled=True)
    orders = set()
    for number in range(60):
        row = {"text": f"Row {number}", "label": number % 3}
        by_text, by_letter = texts.render(row), letters.render(row)
        assert by_text == texts.render(dict(row))
        assert by_text.choices == ["good", "bad", "so so"]
        written = by_text.inputs.splitlines()[2:]
        assert by_letter.inputs == by_text.inputs
        assert f"{by_letter.targets} {by_text.targets}" in written
        orders.add(tuple(line[4:] for line in written))
    assert len(orders) == 6


def test_rows_that_are_skipped_stay_skipped():
    template = Template("t", "{% if label %}a ||| b{% endif %}", "b ||| c")
    assert with_options(template, "flan").render({"label": 0}) is None


def test_tasks_with_options():
    task = PromptedTask(
        "with_options", lambda split: [ROW], [TEMPLATE],
        dict.fromkeys(("inputs", "targets"), seqio.Feature(seqio.ByteVocabulary())),
        {"test": 1}, [], options="flan", shuffled_options=True, held_out_prompts=["fine?"],
    )  # fmt: skip
    [name] = task.register()
    assert name == "with_options_fine_shuffled_options"
    [example] = seqio.TaskRegistry.get(name).source.rows("test")
    assert sorted(example["inputs"].split("\n- ")[1:]) == ["bad", "good", "so so"]
    assert example["answer_choices"] == "good ||| bad ||| so so"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TEMPLATE, "leters"), "'leters'. Did you mean 'letters"),
        ((Template("t", "a ||| b"), "flan"), "Template 't' has no answer_choices"),
        ((TEMPLATE, "none", True), "cannot be shuffled"),
    ],
)
def test_mistakes_in_the_call(arguments, message):
    with pytest.raises(UserError, match=message):
        with_options(*arguments)


@pytest.mark.parametrize(
    ("target", "choices", "message"),
    [
        ("x", "a ||| b", "row 7: the target 'x' is none of its answer choices"),
        ("a", "{{empty}}", "row 7: there are no answer choices"),
        ("a", " ||| ".join(f"a{i}" for i in range(27)), "27 options are more"),
    ],
)
def test_rows_that_cannot_be_lettered(target, choices, message):
    template = with_options(Template("t", f"q ||| {target}", choices), "letters_only")
    with pytest.raises(UserError, match=f"Template 't, options answered by letter', .*{message}"):
        template.render({"empty": ""}, "row 7")
