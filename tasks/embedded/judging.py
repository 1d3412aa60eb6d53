"""Families that judge one text: sentiment, topic, and (never trained) word sense."""

import random

from mtl_jax.tasks.embedded.suite import Family, Row
from mtl_jax.tasks.embedded.words import NAMES, TOPICS, listed

THINGS = listed("film book meal hotel song game show trip story party museum lesson")
ADJECTIVES = (
    listed("great wonderful excellent brilliant lovely superb amazing perfect pleasant delightful"),
    listed("awful terrible boring horrible dull poor dreadful annoying ugly disappointing"),
)
FEELINGS = (
    listed("loved enjoyed praised recommended"),
    listed("hated disliked regretted criticised"),
)
DEGREES = listed("very really quite truly so rather")


def make_sentiment(rng: random.Random, label: int) -> Row:
    """A short opinion, positive (0) or negative (1); "not" turns the adjective round."""
    thing, name, degree = rng.choice(THINGS), rng.choice(NAMES), rng.choice(DEGREES)
    form = rng.randrange(4)
    if form == 0:
        text = f"{name} {rng.choice(FEELINGS[label])} the {thing}"
        text += f" , it was {degree} {rng.choice(ADJECTIVES[label])}"
    elif form == 1:
        text = f"{name} said the {thing} was {degree} {rng.choice(ADJECTIVES[label])}"
    elif form == 2:
        text = f"{name} said the {thing} was not {degree} {rng.choice(ADJECTIVES[1 - label])}"
    else:
        other = rng.choice([t for t in THINGS if t != thing])
        text = f"the {thing} and the {other} were {degree} {rng.choice(ADJECTIVES[label])}"
    return {"text": text, "label": label}


SENTIMENT = Family(
    name="sentiment",
    make=make_sentiment,
    identity=lambda row: [row["text"]],
    num_labels=2,
    held_out=("the sentiment of the text", "answer good or bad", "question about the review"),
)

TOPIC_NAMES = list(TOPICS)


def _topic_sentence(rng: random.Random, first: str, second: str) -> str:
    name = rng.choice(NAMES)
    return rng.choice(
        [
            f"{name} talked about the {first} and the {second}",
            f"the {first} and the {second} were new to {name}",
            f"{name} asked about the {first} before the {second}",
            f"after the {first} {name} remembered the {second}",
            f"this is the story of {name} , a {first} and a {second}",
        ]
    )


def make_topic(rng: random.Random, label: int) -> Row:
    """A sentence with two words of one topic."""
    first, second = rng.sample(TOPICS[TOPIC_NAMES[label]], 2)
    return {"text": _topic_sentence(rng, first, second), "label": label}


TOPIC = Family(
    name="topic",
    make=make_topic,
    identity=lambda row: [row["text"]],
    num_labels=len(TOPIC_NAMES),
    held_out=("the text is about", "question with choices"),
)

# Words with one sense in each of two topics. None of them occurs in another family.
SENSES = {
    "pitch": ("sport", "music"),
    "bass": ("food", "music"),
    "jam": ("food", "travel"),
    "court": ("sport", "travel"),
    "scale": ("music", "food"),
    "track": ("music", "sport"),
    "roll": ("food", "music"),
    "front": ("weather", "travel"),
    "season": ("weather", "sport"),
    "current": ("weather", "travel"),
    "plate": ("food", "sport"),
    "record": ("music", "weather"),
    "date": ("food", "travel"),
    "wave": ("weather", "sport"),
    "score": ("sport", "music"),
    "club": ("sport", "food"),
}


def make_word_sense(rng: random.Random, label: int) -> Row:
    """A word of two senses beside a word of the topic of one of them."""
    word = rng.choice(sorted(SENSES))
    senses = list(SENSES[word])
    context = rng.choice(TOPICS[senses[label]])
    pair = [word, context]
    rng.shuffle(pair)
    return {"text": _topic_sentence(rng, *pair), "word": word, "senses": senses, "label": label}


WORD_SENSE = Family(
    name="word_sense",
    make=make_word_sense,
    identity=lambda row: [row["text"], row["word"]],
    num_labels=2,
    trained=False,
)
