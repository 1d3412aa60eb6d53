"""Families with rules of their own: translation into an invented language, and code evaluation."""

import random
from collections.abc import Callable

from mtl_jax.tasks.embedded.suite import Family, Row
from mtl_jax.tasks.embedded.words import listed

# Lumi, an invented language: nouns end in -o, adjectives in -a, verbs in -i.
LUMI_PEOPLE = dict(
    zip(
        listed("king queen farmer child woman man thief guard"),
        listed("kelo mivo tarno solo bemo zuko panto rilo"),
        strict=True,
    )
)
LUMI_THINGS = dict(
    zip(
        listed("cat dog horse cow bird fish ball boat"),
        listed("hado femo lusto gero nido wapo bolo yemo"),
        strict=True,
    )
)
LUMI_MOODS = dict(
    zip(
        listed("happy sad angry tired curious surprised"),
        listed("nipa xera suda luna fisa toba"),
        strict=True,
    )
)
LUMI_COLORS = dict(
    zip(
        listed("red blue green black white yellow"),
        listed("rila duna gesa moka vita tola"),
        strict=True,
    )
)
LUMI_VERBS = dict(
    zip(
        listed("sees hears follows helps likes fears finds takes"),
        listed("videki sonti parmi guneli ameki tremi troveki preni"),
        strict=True,
    )
)
LUMI_NOT = "na"


def _noun_phrase(
    rng: random.Random, nouns: dict[str, str], adjectives: dict[str, str]
) -> tuple[str, str]:
    noun = rng.choice(list(nouns))
    if rng.random() < 0.3:
        return f"the {noun}", nouns[noun]
    adjective = rng.choice(list(adjectives))
    return f"the {adjective} {noun}", f"{nouns[noun]} {adjectives[adjective]}"


def make_translation(rng: random.Random, label: int) -> Row:
    """Lumi has no articles, puts adjectives behind nouns, verbs last, and then "na" for never."""
    del label
    subject, lumi_subject = _noun_phrase(rng, LUMI_PEOPLE, LUMI_MOODS)
    object_, lumi_object = _noun_phrase(rng, LUMI_THINGS, LUMI_COLORS)
    verb = rng.choice(list(LUMI_VERBS))
    never, lumi_never = rng.choice([("", ""), (" never", f" {LUMI_NOT}")])
    return {
        "text": f"{subject}{never} {verb} {object_}",
        "answer": f"{lumi_subject} {lumi_object} {LUMI_VERBS[verb]}{lumi_never}",
    }


TRANSLATION = Family(
    name="translation",
    make=make_translation,
    identity=lambda row: [row["text"]],
    generated=True,
    held_out=("the text in lumi", "read and translate"),
)

LETTERS = listed("a b c d m n p q x y z")


OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "<": lambda x, y: x < y,
    "==": lambda x, y: x == y,
    "max": max,
    "min": min,
}


def make_arithmetic(rng: random.Random, label: int) -> Row:
    """A small Python expression; the answer is a number from 0 to 10, True or False."""
    del label
    if rng.random() < 0.2:
        items = [rng.randrange(10) for _ in range(rng.randrange(2, 5))]
        index, value = rng.choice([("0", items[0]), ("- 1", items[-1])])
        return {"text": f"{_as_list(items)} [ {index} ]", "answer": str(value)}
    operation = rng.choice(list(OPERATIONS))
    (first, second), (x, y) = rng.sample(LETTERS, 2), rng.choices(range(6), k=2)
    if operation == "-" and x < y:
        x, y = y, x
    if operation == "==" and rng.random() < 0.4:
        y = x
    called = f"{operation} ( {first} , {second} )"
    expression = called if operation.isalpha() else f"{first} {operation} {second}"
    return {
        "text": f"{first} = {x} ; {second} = {y} ; {expression}",
        "answer": str(OPERATIONS[operation](x, y)),
    }


def _as_list(items: list[int]) -> str:
    return f"[ {' , '.join(map(str, items))} ]"


ARITHMETIC = Family(
    name="arithmetic",
    make=make_arithmetic,
    identity=lambda row: [row["text"]],
    generated=True,
    held_out=("the result is", "compute the value"),
)
