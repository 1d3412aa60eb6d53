"""Triples as text: forms, the budget, and rows with the text in a prompt."""

import pytest
import seqio

from mtl_jax.errors import UserError
from mtl_jax.tasks.prompted import PromptedTask
from mtl_jax.tasks.prompts import Template
from mtl_jax.tasks.triples import linearise, with_triples

BEAN = ("Alan Bean", "occupation", "astronaut")
WHEELER = ("Alan Bean", "born in", "Wheeler")
VOCABULARY = seqio.ByteVocabulary()


def test_styles():
    assert linearise([BEAN, WHEELER]) == (
        "Alan Bean | occupation | astronaut && Alan Bean | born in | Wheeler",
        0,
    )
    assert linearise([BEAN, WHEELER], style="tags") == (
        "<S> Alan Bean <P> occupation <O> astronaut <S> Alan Bean <P> born in <O> Wheeler",
        0,
    )
    assert linearise([]) == ("", 0)


@pytest.mark.parametrize(
    "triple",
    [
        list(BEAN),
        {"object": "astronaut", "subject": "Alan Bean", "relation": "occupation", "more": 1},
        "Alan Bean | occupation | astronaut",
        ["Alan\n Bean ", "occupation", "astronaut"],
    ],
)
def test_forms_of_a_triple(triple):
    assert linearise([triple]) == linearise([BEAN])


@pytest.mark.parametrize("style", ["pipes", "tags"])
def test_budget_takes_each_in_turn_that_still_fits(style):
    """Against all subsets: the line is that of the greedy one, and not longer than the budget."""
    triples = [("a", "b", "c"), ("long subject", "relation", "object"), ("d", "e", "f"), BEAN]
    for budget in range(100):
        taken = []
        for triple in triples:
            if len(linearise([*taken, triple], style=style)[0]) <= budget:
                taken.append(triple)
        expected = linearise(taken, style=style)[0]
        assert linearise(triples, budget, len, style) == (expected, 4 - len(taken))
        assert len(expected) <= budget
    # The short third one is taken though the second does not fit.
    assert linearise(triples, 30, len, "pipes") == ("a | b | c && d | e | f", 2)


def test_a_prompt_uses_the_knowledge_of_its_rows():
    rows = {"train": [{"facts": [BEAN, WHEELER], "text": "t"}, {"facts": [], "text": "u"}]}
    knowing = with_triples(rows.__getitem__, "facts", 40, VOCABULARY)
    assert [row["knowledge_dropped"] for row in knowing("train")] == [1, 0]
    assert "knowledge" not in rows["train"][0]
    task = PromptedTask(
        "with_triples", knowing,
        [Template("say", "{% if knowledge %}Facts: {{knowledge}} ||| {{text}}{% endif %}")],
        dict.fromkeys(("inputs", "targets"), seqio.Feature(VOCABULARY)), ["train"], [],
    )  # fmt: skip
    [name] = task.register()
    [example] = seqio.TaskRegistry.get(name).source.rows("train")
    assert example["inputs"] == "Facts: Alan Bean | occupation | astronaut"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"fact": []}, "train row 0: there is no field 'facts'.*Did you mean 'fact'"),
        ({"facts": "a | b | c"}, "not a list of triples"),
        ({"facts": [["a", "b"]]}, r"train row 0: \['a', 'b'\] is no triple"),
        ({"facts": [["a", "", "b"]]}, "is no triple"),
        ({"facts": ["a | b | c | d"]}, "is no triple"),
        ({"facts": [{"subject": 1, "relations": 2, "object": 3}]}, "Did you mean 'relations'"),
        ({"facts": [], "knowledge": ""}, "'knowledge' is there already"),
    ],
)
def test_rows_that_are_refused(row, message):
    knowing = with_triples(lambda split: [row], "facts", 10, VOCABULARY)
    with pytest.raises(UserError, match=message):
        knowing("train")


def test_mistakes_in_the_call():
    with pytest.raises(UserError, match=r"'tag'\. Did you mean 'tags'"):
        linearise([], style="tag")
    with pytest.raises(UserError, match="at least 0 tokens"):
        linearise([], -1)
