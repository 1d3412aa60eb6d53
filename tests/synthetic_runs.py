"""Run directories as training leaves them, with numbers made by formula."""

import json
from pathlib import Path
from typing import Any

import numpy as np

TASKS = ("nli", "qa", "sentiment", "topic")
SETTINGS = {
    "Run.steps": 300,
    "Run.seed": 0,
    "Data.seed": 0,
    "Data.batch_size": 32,
    "Data.inputs_length": 64,
    "Data.targets_length": 16,
    "Data.mixture": "all",
    "Eval.split": "validation",
    "Balance.method": "",
    "Optimizer.learning_rate": 0.003,
}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(
    folder: Path,
    scores: dict[str, float],
    *,
    method: str = "",
    trained: tuple[str, ...] = TASKS,
    seed: int = 0,
    seconds_per_step: float = 0.1,
    metric: str = "accuracy",
    options: dict[str, Any] | None = None,
    held_out: tuple[str, ...] = (),
    **settings: Any,
) -> Path:
    """A finished run of 300 steps, evaluated every 100; at 100 and 200 it scores 20 and 10 less."""
    folder.mkdir(parents=True)
    given = {name.replace("__", "."): value for name, value in settings.items()}
    values = SETTINGS | {"Run.seed": seed, "Data.seed": seed, "Balance.method": method} | given
    lines = [f"{name} = {value!r}" for name, value in sorted(values.items())]
    (folder / "config.gin").write_text("# made\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    ids = {name: number for number, name in enumerate(trained, start=1)}
    (folder / "tasks.json").write_text(json.dumps(ids), encoding="utf-8")
    if options is not None:
        described = {"method": method, "options": options}
        (folder / "method.json").write_text(json.dumps(described), encoding="utf-8")
    results = [
        {"task": task, "dataset": task, "prompt": "", "family": "", "trained": task not in held_out,
         "split": "validation", "step": step, "metric": metric, "value": value - lower, "n": 100}
        for step, lower in ((100, 20.0), (200, 10.0), (300, 0.0))
        for task, value in scores.items()
    ]  # fmt: skip
    write_lines(folder / "results.jsonl", results)
    metrics = [
        # The first line holds the time of compiling.
        {"step": step, "time": 0.0, "loss": 2.0, "learning_rate": 0.01,
         "seconds_per_step": seconds_per_step + (5.0 if step == 10 else 0.0)}
        for step in range(10, 301, 10)
    ]  # fmt: skip
    write_lines(folder / "metrics.jsonl", metrics)
    return folder


def add_gradients(
    folder: Path,
    cosine_NN: np.ndarray,
    *,
    tasks: tuple[str, ...] = TASKS,
    groups: tuple[str, ...] = ("whole_model",),
    noise: float | None = 0.4,
    jitter: float = 0.05,
    losses: np.ndarray | None = None,
    lookahead_NN: np.ndarray | None = None,
) -> None:
    """Adds weights, gradients.jsonl and so on to a run; gradients all have the length 2.

    Every second line has the affinity `lookahead_NN`.
    """
    generator = np.random.default_rng(7)
    count = len(tasks)
    path = folder / "metrics.jsonl"
    metrics = [json.loads(line) for line in path.read_text().splitlines()]
    rows = []
    for row in metrics:
        turn = 2 * np.pi * row["step"] / 300
        weights = np.array([1 + 0.6 * np.sin(turn + i) for i in range(count)])
        for i, task in enumerate(tasks):
            row[f"weight/{task}"] = weights[i]
            row[f"effective_share/{task}"] = weights[i] / weights.sum()
            row[f"gradient_norm/{task}"] = 2.0
            row[f"epochs/{task}"] = row["step"] / 100 * (i + 1)
            row[f"loss/{task}"] = 2.0 if losses is None else float(losses[i])
        row |= {"conflict_rate": 0.3 + 0.1 * np.sin(turn), "solver_fallback": 0.0}
        shaken = generator.normal(0, jitter, (len(groups), count, count))
        shaken = np.clip(cosine_NN + (shaken + shaken.swapaxes(1, 2)) / 2, -1, 1)
        shaken[:, np.arange(count), np.arange(count)] = 1.0
        rows.append(
            {
                "step": row["step"],
                "tasks": list(tasks),
                "groups": list(groups),
                "steps": 10,
                "gram": (4.0 * shaken / len(groups)).tolist(),
                "cosine": shaken.tolist(),
                "noise": [[noise] * count] * len(groups),
            }
        )
        if lookahead_NN is not None and row["step"] % 20 == 0:
            rows[-1] |= {"lookaheads": 2, "affinity": lookahead_NN.tolist()}
    write_lines(path, metrics)
    write_lines(folder / "gradients.jsonl", rows)
