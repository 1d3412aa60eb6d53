"""Families that read and answer in words: question answering, summaries, dialogue, data to text."""

import random

from mtl_jax.tasks.embedded.suite import Family, Row
from mtl_jax.tasks.embedded.words import CITIES, COLORS, DRINKS, JOBS, NAMES, NOUNS, PLACES, listed


def make_qa(rng: random.Random, label: int) -> Row:
    """Three facts in any order and a question about one; the answer is one word of the text."""
    del label
    name, job, city = rng.choice(NAMES), rng.choice(JOBS), rng.choice(CITIES)
    drink, color, noun = rng.choice(DRINKS), rng.choice(COLORS), rng.choice(NOUNS)
    facts = [
        f"{name} is a {job} in {city}",
        rng.choice([f"{name} drinks {drink}", f"{drink} is what {name} drinks"]),
        rng.choice([f"{name} has a {color} {noun}", f"the {noun} of {name} is {color}"]),
    ]
    rng.shuffle(facts)
    question, answer = rng.choice(
        [
            (f"what is the job of {name}", job),
            (f"where does {name} live", city),
            (f"what does {name} drink", drink),
            (f"what does {name} have", noun),
            (f"what color is the {noun}", color),
            (f"who has the {noun}", name),
        ]
    )
    return {"context": " . ".join(facts), "question": question, "answer": answer}


QA = Family(
    name="qa",
    make=make_qa,
    # The same facts in another order are the same text, so they are in the same split.
    identity=lambda row: [*sorted(row["context"].split(" . ")), row["question"]],
    generated=True,
    reading=True,
    held_out=("question about the text", "ask first"),
)

PEOPLE = listed("king mayor queen artist writer captain guard student neighbor thief judge uncle")
DEEDS = listed("bought sold found lost opened closed painted built broke visited cleaned fixed")
OBJECTS = listed("house bridge window clock boat gate tower door wall shop picture machine")
FILLERS = [
    "it was a {0} day",
    "many people were {1}",
    "nobody knew why",
    "it happened on {2}",
    "the day was {0}",
    "everybody was {1}",
]
DAYS = listed("monday tuesday wednesday thursday friday saturday sunday")
DAY_WORDS = listed("sunny rainy cloudy windy foggy snowy")
MOODS = listed("happy sad angry surprised tired curious")


def _filler(rng: random.Random) -> str:
    return rng.choice(FILLERS).format(rng.choice(DAY_WORDS), rng.choice(MOODS), rng.choice(DAYS))


def make_summary(rng: random.Random, label: int) -> Row:
    """Three sentences of which one tells what happened; the summary is its who, what and whom."""
    del label
    who, deed, what = rng.choice(PEOPLE), rng.choice(DEEDS), rng.choice(OBJECTS)
    event = rng.choice(
        [
            f"the {who} {deed} the {what} in the {rng.choice(PLACES)}",
            f"in the {rng.choice(PLACES)} the {who} {deed} a {what}",
        ]
    )
    sentences = [_filler(rng), _filler(rng)]
    sentences.insert(rng.randrange(3), event)
    return {"text": " . ".join(sentences), "answer": f"{who} {deed} {what}"}


SUMMARY = Family(
    name="summarisation",
    make=make_summary,
    identity=lambda row: [row["text"]],
    generated=True,
    summary=True,
    held_out=("summary of the text", "what happened in the text"),
)

# Kind of question to (questions, replies). {0} is a thing, {1} a name.
TALK = {
    "place": (
        ["where is the {0}", "where did {1} go", "where did you see {1}"],
        [f"in the {place}" for place in PLACES],
    ),
    "time": (
        ["when does {1} arrive", "when did you buy the {0}", "when do we meet {1}"],
        ["at noon", "at midnight", "tomorrow morning", *(f"on {day}" for day in DAYS)],
    ),
    "person": (
        ["who took the {0}", "who called {1}", "who owns the {0}"],
        [f"my {person}" for person in listed("mother father sister brother friend boss cousin")],
    ),
    "number": (
        ["how many friends has {1}", "how old is {1}", "how many days did {1} stay"],
        ["only two", "about three", "more than four", "nearly five", "exactly six", "almost ten"],
    ),
    "reason": (
        ["why is {1} sad", "why did {1} leave", "why did you sell the {0}"],
        [f"because of the {thing}" for thing in listed("noise rain price smell heat traffic")],
    ),
}


def make_dialogue(rng: random.Random, label: int) -> Row:
    """A question and three replies, one of which answers that kind of question."""
    kinds = rng.sample(sorted(TALK), 3)
    question = rng.choice(TALK[kinds[label]][0]).format(rng.choice(NOUNS), rng.choice(NAMES))
    return {
        "question": question,
        "replies": [rng.choice(TALK[kind][1]) for kind in kinds],
        "label": label,
    }


DIALOGUE = Family(
    name="dialogue",
    make=make_dialogue,
    # The same replies in another order are the same question, so they are in the same split.
    identity=lambda row: [row["question"], *sorted(row["replies"])],
    num_labels=3,
    held_out=("what is the reply", "choices first"),
)


def make_data_to_text(rng: random.Random, label: int) -> Row:
    """Fields in any order; the sentence has a fixed order."""
    del label
    name, job = rng.choice(NAMES), rng.choice(JOBS)
    city, drink = rng.choice(CITIES), rng.choice(DRINKS)
    fields = [f"name = {name}", f"job = {job}", f"city = {city}", f"drink = {drink}"]
    rng.shuffle(fields)
    return {
        "fields": " ; ".join(fields),
        "content": [name, job, city, drink],
        "answer": f"{name} is a {job} in {city} and drinks {drink}",
    }


DATA_TO_TEXT = Family(
    name="data_to_text",
    make=make_data_to_text,
    identity=lambda row: row["content"],
    generated=True,
    held_out=("describe the person", "sentence for the data"),
)
