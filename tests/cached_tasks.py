"""Tasks that tests/test_caching.py caches; the caching job imports this module, too."""

import seqio
import tensorflow as tf

from mtl_jax import caching, metrics
from mtl_jax.tasks.embedded import output_features
from mtl_jax.tasks.embedded.families import FAMILIES
from mtl_jax.tasks.embedded.suite import make_rows
from mtl_jax.tasks.prompted import PromptedTask
from mtl_jax.tasks.prompts import Template

SIZES = {"train": 150, "validation": 70}
# Leaves rows out, so that the rows of a split and its examples have different numbers.
SOME = Template(
    "some",
    "{% if label %}{{premise}} ||| {{answer_choices[label]}}{% endif %}",
    "No ||| Yes ||| So",
)
NLI = next(family for family in FAMILIES if family.name == "nli")


def rows(split):
    return make_rows(NLI, split, SIZES[split])


def fields(row):
    """Of every type that an example may have; 0.1 has no float32."""
    label = row["label"]
    return {"is_correct": label == 1, "weight": label + 0.1, "number": label, "parts": ["a", "é"]}


def prompted(template, variant):
    task = PromptedTask(
        "cached", rows, [template], output_features(), SIZES, [metrics.accuracy], fields=fields
    )
    return task.register((variant,))[0]


TRAIN = prompted(NLI.templates[0], "train")
GENERATE, RANK = (prompted(SOME, variant) for variant in ("generate", "rank"))
for name in (TRAIN, GENERATE, RANK):
    # Several parts a split: the workers of a job divide it.
    seqio.TaskRegistry.get(name).source.rows_of_a_part = 40


def classified(split, shuffle_files=False, seed=None):
    """As T5's rank_classification: an example for each choice, and whether it is right."""
    del split, shuffle_files, seed
    texts = [f"is {number} even" for number in range(20)]
    return tf.data.Dataset.from_tensor_slices(
        {
            "inputs": [text for text in texts for _ in range(2)],
            "targets": ["yes", "no"] * 20,
            "is_correct": [number % 2 == choice for number in range(20) for choice in range(2)],
            "idx": [[number, choice] for number in range(20) for choice in range(2)],
        }
    )


# T5's own tasks cache tokens.
for name, steps in {
    "cached_tokens": (seqio.preprocessors.tokenize, *caching.HERE),
    "cached_nowhere": (*caching.HERE, seqio.preprocessors.tokenize),
    "cached_never": (seqio.preprocessors.tokenize,),
}.items():
    seqio.TaskRegistry.add(
        name,
        seqio.FunctionDataSource(classified, ["train"]),
        preprocessors=[*steps, seqio.preprocessors.append_eos],
        output_features=output_features(),
    )
CACHED = (TRAIN, GENERATE, RANK, "cached_tokens")
