"""Families that compare two texts: inference, and (never trained) paraphrase identification."""

import random

from mtl_jax.tasks.embedded.suite import Family, Row
from mtl_jax.tasks.embedded.words import KIND_OF, NAMES, NOUNS, OPPOSITE_OF, STATES

YES, NO, MAYBE = range(3)


def _two_states(rng: random.Random) -> list[str]:
    """Two states that can hold together."""
    first = rng.choice(STATES)
    second = rng.choice([s for s in STATES if s not in (first, OPPOSITE_OF[first])])
    return [first, second]


def _unrelated_state(rng: random.Random, states: list[str]) -> str:
    """A state that neither follows from the states nor contradicts them."""
    related = {*states, *(OPPOSITE_OF[state] for state in states)}
    return rng.choice([state for state in STATES if state not in related])


def make_nli(rng: random.Random, label: int) -> Row:
    """Does the hypothesis follow (0), contradict (1), or neither (2)?

    It names the thing or its kind and says a state: the given one, its opposite, or another.
    """
    noun, name, given = rng.choice(NOUNS), rng.choice(NAMES), rng.choice(STATES)
    if label == YES:
        state = given
    elif label == NO:
        state = OPPOSITE_OF[given]
    else:
        state = _unrelated_state(rng, [given])
    return {
        "premise": f"the {noun} of {name} is {given}",
        "hypothesis": f"the {rng.choice([noun, KIND_OF[noun]])} is {state}",
        "label": label,
    }


NLI = Family(
    name="nli",
    make=make_nli,
    identity=lambda row: [row["premise"], row["hypothesis"]],
    num_labels=3,
    held_out=("is it true that", "text and question", "read the text"),
)


def make_paraphrase(rng: random.Random, label: int) -> Row:
    """Do the sentences mean the same? If not, a state is turned round or another one."""
    noun, name = rng.choice(NOUNS), rng.choice(NAMES)
    states = _two_states(rng)
    others = states[::-1]
    if label == NO:
        changed = rng.randrange(2)
        if rng.randrange(2):
            others[changed] = OPPOSITE_OF[others[changed]]
        else:
            others[changed] = _unrelated_state(rng, states)
    first, second = f"the {noun} of {name} is", f"the {noun} is"
    pair = [f"{first} {states[0]} and {states[1]}", f"{second} {others[0]} and {others[1]}"]
    rng.shuffle(pair)
    return {"first": pair[0], "second": pair[1], "label": label}


PARAPHRASE = Family(
    name="paraphrase",
    make=make_paraphrase,
    identity=lambda row: [row["first"], row["second"]],
    num_labels=2,
    trained=False,
)
