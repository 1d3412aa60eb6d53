"""In-context training as MetaICL does it: exemplars drawn anew for every example of every epoch.

    in_context_task("p3_glue_mrpc_equivalent", 16)                    # direct
    in_context_task("p3_glue_mrpc_equivalent", 16, channel=True)      # channel
    in_context_mixture("p3_in_context", "p3_t0_train", 4)             # of all tasks of a mixture

Min et al. 2022, MetaICL: Learning to Learn In Context. The model reads k examples of a task with
their answers and an input, and learns the answer to the latter: `x1 y1 x2 y2 ... x -> y`. The
channel model (Min et al. 2022, Noisy Channel Language Model Prompting) reads answers before inputs
and learns the input: `y1 x1 ... y -> x`.

MetaICL's examples are a line break apart from their answers and three from one another. Where it
cuts the tokens of inputs that are too long from the left, whole exemplars are left out here, as
everywhere (`few_shot.Shots.max_tokens`).
"""

import seqio

from mtl_jax.errors import UserError
from mtl_jax.mixtures import provider, rates_of, task_names
from mtl_jax.tasks.few_shot import Shots, add_variant

SEPARATOR = "\n\n\n"


def in_context_task(
    name: str,
    shots: int = 16,
    *,
    channel: bool = False,
    max_tokens: int | None = 1024,
    seed: int = 0,
    balanced: bool = False,
) -> str:
    """Registers a task's variant for in-context training, once, and returns its name.

    It has the split `train` alone, from which the exemplars are drawn, too: others in each epoch
    (where `Data.shuffle` is on), but the same ones for the same epoch of the same seed, however the
    data is sharded and after a restart. To evaluate what was trained use `few_shot_task` with
    `separator=in_context.SEPARATOR`.

    Args:
        name: a registered task with a split `train` and texts `inputs` and `targets`.
        shots: exemplars in front of each input.
        channel: the answer is given and the input is learned.
        max_tokens: of an input with its exemplars; exemplars that do not fit are left out.
        seed: of the draws.
        balanced: the exemplars' answers go through the answer choices.

    Raises:
        UserError: no such task, or one without a split `train`, or values that cannot be used.
    """
    if shots < 1:
        raise UserError(f"in_context_task: at least one exemplar is needed, not {shots}.")
    task = provider(name)
    if "train" not in task.splits:
        raise UserError(
            f"in_context_task: {name!r} has no split 'train'; it has {', '.join(task.splits)}."
        )
    how = Shots(shots, "train", seed, max_tokens, SEPARATOR, balanced)
    usual = Shots(shots, max_tokens=1024, separator=SEPARATOR)
    suffix = f"{'channel' if channel else 'in_context'}_{how.suffix(usual)}"
    return add_variant(
        name,
        suffix,
        how,
        "in_context_task",
        splits=("train",),
        anew=True,
        channel=channel,
    )


def in_context_mixture(new: str, mixture: str, shots: int = 16, *, channel: bool = False) -> str:
    """Registers the in-context variants of all tasks of a mixture as a mixture, at their rates.

    Args:
        new: name of the mixture.
        mixture: a registered mixture or task.
        shots: see `in_context_task`.
        channel: see `in_context_task`.

    Raises:
        UserError: `new` is registered already, or as `in_context_task`.
    """
    if new in (*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()):
        raise UserError(f"in_context_mixture: {new!r} is registered already; choose another name.")
    rates = rates_of(mixture)
    seqio.MixtureRegistry.add(
        new,
        [
            (in_context_task(name, shots, channel=channel), rates[name])
            for name in task_names(mixture)
        ],
    )
    return new
