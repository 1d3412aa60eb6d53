"""Pooled encoder states of a finished run's evaluation inputs, for its report."""

from pathlib import Path

import numpy as np

from mtl_jax import config, inference
from mtl_jax.analysis.run_analysis import FOLDER
from mtl_jax.analysis.state_files import save_states
from mtl_jax.errors import UserError
from mtl_jax.interop import native


def represent(run: Path, examples: int = 64) -> Path:
    """Embeds inputs of each evaluated dataset and writes analysis/representations.*.

    The same inputs are taken for every run with the same Eval.tasks, Eval.split and Eval.seed, so
    that runs can be compared. Where tasks have parameters of their own, a task's inputs are
    embedded with the T5 that it is evaluated with.

    Args:
      run: the run directory; its newest checkpoint is loaded.
      examples: of a dataset at most, shared by its prompts.

    Returns:
      The path of representations.json.

    Raises:
      UserError: no configuration or checkpoint, no evaluated tasks, or too few examples.
    """
    if examples < 5:
        raise UserError(f"--examples must be at least 5, for a probe with 5 folds, got {examples}.")
    cfg = config.load([str((run / "config.gin").absolute())])
    if not cfg.eval.tasks:
        raise UserError(f"{run}: Eval.tasks is empty, so there are no inputs to embed.")
    texts = _texts(cfg, examples)
    inputs = [text for of_dataset in texts.values() for _, text in of_dataset]
    labels = np.repeat(np.arange(len(texts)), [len(found) for found in texts.values()])
    plan = native.sharing_of(run)
    whose = [
        None if plan is None else plan.evaluated_as(task)
        for found in texts.values()
        for task, _ in found
    ]
    states: dict[int, np.ndarray] = {}
    for task in dict.fromkeys(whose):
        model = inference.load(run, inputs_length=cfg.eval.inputs_length, task=task)
        places = [i for i, other in enumerate(whose) if other == task]
        states |= zip(places, model.embed([inputs[i] for i in places]), strict=True)
    states_ND = np.stack([states[i] for i in range(len(inputs))])
    return save_states(run / FOLDER, states_ND, labels, list(texts), inputs, model.step)


def _texts(cfg: config.Config, examples: int) -> dict[str, list[tuple[str, str]]]:
    """Dataset -> (task, text) of its inputs, drawn evenly from its tasks."""
    # Needs TensorFlow, which the rest of a report does without.
    from mtl_jax import mixtures
    from mtl_jax.eval_reading import load_eval_task
    from mtl_jax.task_info import info

    mixtures.load_modules(cfg.data)
    by_dataset: dict[str, list[str]] = {}
    for name in mixtures.expand(cfg.eval.tasks):
        by_dataset.setdefault(info(name).dataset, []).append(name)
    texts: dict[str, list[tuple[str, str]]] = {}
    for dataset, names in by_dataset.items():
        for name in names:
            task = load_eval_task(
                name,
                cfg.eval.split,
                cfg.eval.inputs_length,
                cfg.eval.targets_length,
                limit=-(-examples // len(names)),
                seed=cfg.eval.seed,
                use_cached=cfg.eval.use_cached,
            )
            texts.setdefault(dataset, []).extend((name, e.inputs_text) for e in task.examples)
        texts[dataset] = texts[dataset][:examples]
    return texts
