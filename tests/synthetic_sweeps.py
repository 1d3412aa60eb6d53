"""Folders of sweeps as `mtl-jax sweep` leaves them, with answers drawn from a known model.

Whether an answer is right depends on the checkpoint's skill, the prompt and how hard the example
is, which is the same under all prompts.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax import sweep_files

RANKING = ("t0", "mean_token", "lm_eval")
GENERATING = {"generate": ("rouge1", "rouge2"), "tk_instruct": ("rougeL_stemmed",)}
SKILLS = {("p3", 200): 0.0, ("p3", 400): 0.8}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What is asked; `texts` are put into the inputs."""

    name: str
    prompts: int
    examples: int
    family: str
    choices: tuple[str, ...] = ()
    language: str = "en"
    trained: bool = False
    base: float = 0.0
    words: int = 30
    split: str = "validation"
    original: bool = True


DATASETS = (
    Dataset("super_glue_cb", 12, 56, "nli", ("Yes", "No", "Maybe")),
    Dataset("super_glue_copa", 8, 100, "commonsense", ("the rain", "the sun"), trained=True),
    Dataset("ag_news", 7, 120, "topic", ("World", "Sports", "Business", "Science"), base=0.5),
    Dataset("news_summary", 5, 40, "summarisation", words=120),
    Dataset("xnli_en", 3, 90, "nli", ("true", "false", "neither"), "en", base=0.8),
    Dataset("xnli_fr", 3, 90, "nli", ("vrai", "faux", "ni l'un ni l'autre"), "fr", base=0.4),
    Dataset("xnli_sw", 3, 90, "nli", ("kweli", "uongo", "wala"), "sw", base=-0.3),
)
_TEXT = "the court said on Monday that rivers of rain had left two towns without power "


def write_sweep(
    folder: Path,
    datasets: Sequence[Dataset] = DATASETS,
    skills: Mapping[tuple[str, int], float] = SKILLS,
    shots: Sequence[int] = (0, 2),
    seed: int = 0,
    marker: str = "",
) -> Path:
    """Writes all cells and the table; `marker` is put into every input and prediction."""
    rows = []
    for dataset in datasets:
        rng = np.random.default_rng([seed, *dataset.name.encode()])
        hardness_N = rng.normal(0, 1, dataset.examples)
        tastes_P = rng.normal(0, 0.5, dataset.prompts)
        for prompt, taste in enumerate(tastes_P):
            for (run, step), skill in skills.items():
                for count in shots:
                    logit_N = dataset.base + skill + taste + 0.2 * count - hardness_N
                    facts = _facts(dataset, prompt, run, step, count, seed)
                    where = sweep_files.cell_folder(
                        folder, facts.checkpoint, facts.task, count, facts.key
                    )
                    lines = _predictions(dataset, prompt, logit_N, rng, marker)
                    sweep_files.write_lines(where / sweep_files.PREDICTIONS, lines)
                    cell = _rows(dataset, facts, lines)
                    sweep_files.write_lines(where / sweep_files.RESULTS, cell)
                    sweep_files.write_facts(where, facts)
                    rows += cell
    sweep_files.write_lines(folder / sweep_files.RESULTS, rows)
    command = "mtl-jax sweep --gin_file=gin/runs/zero_shot.gin\n"
    (folder / "command.txt").write_text(command, encoding="utf-8")
    versions = {"python": "3.11.9", "jax": "0.10.2", "device_kind": "cpu", "device_count": 1}
    (folder / "versions.json").write_text(json.dumps(versions), encoding="utf-8")
    return folder


def _facts(
    dataset: Dataset, prompt: int, run: str, step: int, shots: int, seed: int
) -> sweep_files.CellFacts:
    depends = f"{run}{step}{dataset.name}{dataset.split}{prompt}{shots}{seed}"
    name = f"{('GPT-3 style', 'can we infer', 'must be true', 'guaranteed')[prompt % 4]} {prompt}"
    return sweep_files.CellFacts(
        run=run,
        checkpoint=f"{run}@{step}",
        step=step,
        task=f"{dataset.name}_prompt_{prompt}",
        dataset=dataset.name,
        prompt=name,
        family=dataset.family,
        language=dataset.language,
        original=dataset.original,
        trained=dataset.trained,
        split=dataset.split,
        shots=shots,
        key=hashlib.sha256(depends.encode()).hexdigest()[:24],
        n=dataset.examples,
        skipped=3 if prompt == 1 else 0,
        truncated={"rank": 2 if prompt == 2 else 0},
        seconds={"rank": 1.5},
        tokens={"rank": dataset.examples * 60},
    )


def _predictions(
    dataset: Dataset, prompt: int, logit_N: np.ndarray, rng: np.random.Generator, marker: str
) -> list[dict[str, Any]]:
    words = " ".join((_TEXT * 40).split()[: dataset.words])
    made = []
    for index, logit in enumerate(logit_N):
        inputs = f"{marker}Prompt {prompt}, example {index}: {words}. Which one is it?"
        line: dict[str, Any] = {"index": index, "inputs": inputs, "choices": list(dataset.choices)}
        if dataset.choices:
            target = index % len(dataset.choices)
            line["targets"] = dataset.choices[target]
            by_protocol = {}
            for protocol in RANKING:
                values = np.round(rng.normal(-6, 0.5, len(dataset.choices)), 4)
                right = rng.random() < 1 / (1 + np.exp(-logit))
                chosen = target if right else (target + 1) % len(dataset.choices)
                values[chosen] = values.max() + 0.25
                by_protocol[protocol] = {
                    "prediction": dataset.choices[chosen],
                    "score": 100.0 * right,
                    "values": values.tolist(),
                }
        else:
            line["targets"] = ["two towns lost power", "rain left two towns in the dark"]
            by_protocol = {}
            for protocol in GENERATING:
                score = round(100 / (1 + float(np.exp(-logit - rng.normal()))), 4)
                text = f"{marker}power is lost in {index} towns"
                by_protocol[protocol] = {"prediction": text, "score": score}
        made.append(line | {"by_protocol": by_protocol})
    return made


def _rows(
    dataset: Dataset, facts: sweep_files.CellFacts, lines: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    values: list[tuple[str, str, float]] = []
    for protocol in lines[0]["by_protocol"]:
        mean = float(np.mean([line["by_protocol"][protocol]["score"] for line in lines]))
        if dataset.choices:
            values.append((protocol, "accuracy", mean))
        else:
            # A second metric that is no mean of the examples' scores.
            values += [
                (protocol, metric, mean if place == 0 else mean / 2)
                for place, metric in enumerate(GENERATING[protocol])
            ]
    if dataset.choices:
        # Right answers take turns, the first choice first.
        most = -(-facts.n // len(dataset.choices))
        values += [
            ("random", "accuracy", 100 / len(dataset.choices)),
            ("majority", "accuracy", 100 * most / facts.n),
        ]
    else:
        values += [("copy_input", "rouge1", 21.0), ("copy_input", "rougeL_stemmed", 18.5)]
    if facts.shots:
        values += [("copy_demonstration", values[0][1], 30.0)]
    about = dataclasses.asdict(facts)
    told = {name: about[name] for name in sweep_files.RESULT_COLUMNS if name in about}
    told["truncated"] = max(facts.truncated.values())
    return [
        told | {"protocol": protocol, "metric": metric, "value": value}
        for protocol, metric, value in values
    ]
