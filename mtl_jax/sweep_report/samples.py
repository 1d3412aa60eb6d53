"""A few predictions to be read: as many right as wrong, over all datasets and prompts."""

from collections.abc import Iterator, Sequence
from typing import Any

from mtl_jax.sweep_report.choosing import Choosing
from mtl_jax.sweep_report.gather import Material, Sample

_MOST = 300
_SHORT = 420  # characters that are shown at once
_LONG = 6000  # at most, behind a click
_TEXTS = 800_000  # characters of all inputs together
RIGHT, WRONG, PARTLY = "right", "wrong", "partly right"
_OUTCOMES = {RIGHT: "r0", WRONG: "r1", PARTLY: "r2"}


def outcome(score: float | None) -> str:
    """In words what a score of 0 to 100 says of one prediction."""
    if score is None or score < 0.05:
        return WRONG
    return RIGHT if score > 99.95 else PARTLY


def choose(material: Material) -> list[Sample]:
    """At most 300 samples of the newest checkpoint of each run.

    Datasets take turns, within them the prompts, and within these wrong and right ones; so no
    dataset, prompt or outcome crowds out another.
    """
    newest = {checkpoint.run: checkpoint for checkpoint in material.checkpoints}
    shown = set(newest.values())
    by_dataset: dict[str, list[list[Sample]]] = {}
    for result in material.results:
        if result.checkpoint in shown and result.samples:
            half = len(result.samples)
            wrong = [s for s in result.samples if outcome(_first(s)["score"]) != RIGHT]
            right = [s for s in result.samples if outcome(_first(s)["score"]) == RIGHT]
            turns = [s for i in range(half) for s in (*wrong[i : i + 1], *right[i : i + 1])]
            by_dataset.setdefault(result.dataset, []).append(turns)
    queues = [_turns(prompts) for prompts in by_dataset.values()]
    chosen = _turns([list(queue) for queue in queues])
    picked = [sample for _, sample in zip(range(_MOST), chosen, strict=False)]
    datasets = list(by_dataset)
    return sorted(picked, key=lambda s: (datasets.index(s.dataset), s.prompt, s.shots))


def _turns(queues: Sequence[Sequence[Sample]]) -> Iterator[Sample]:
    """One of each queue, then the next of each."""
    for place in range(max(map(len, queues), default=0)):
        for queue in queues:
            if place < len(queue):
                yield queue[place]


def _first(sample: Sample) -> dict[str, Any]:
    return dict(next(iter(sample.row["by_protocol"].values())))


def cards(chosen: Sequence[Sample], choosing: Choosing) -> dict[str, Any] | None:
    """The samples as the page shows them, with what its selectors choose from."""
    if not chosen:
        return None
    longest = max(_SHORT, min(_LONG, _TEXTS // len(chosen)))
    prompts = list(dict.fromkeys((s.dataset, s.prompt) for s in chosen))
    made = [_card(sample, longest) for sample in chosen]
    printed: dict[tuple[str, str], int] = {}
    for card, sample in zip(made, chosen, strict=True):
        tokens = choosing.tokens(
            checkpoint=sample.checkpoint, shots=sample.shots, dataset=sample.dataset
        )
        tokens.append(f"q{prompts.index((sample.dataset, sample.prompt))}")
        tokens.append(_OUTCOMES[card["outcome"]])
        hidden = choosing.hidden(tokens)
        # Paper has room for one of each outcome.
        seen = printed[sample.dataset, card["outcome"]] = printed.get(
            (sample.dataset, card["outcome"]), 0
        ) + (not hidden)
        card |= {"tokens": " ".join(tokens), "hidden": hidden, "more": seen > 1}
    outcomes = [name for name in _OUTCOMES if any(card["outcome"] == name for card in made)]
    groups: dict[str, list[tuple[str, str]]] = {}
    for number, (dataset, prompt) in enumerate(prompts):
        groups.setdefault(dataset, []).append((f"q{number}", prompt))
    return {
        "cards": made,
        "prompts": groups if len(prompts) > 1 else {},
        "outcomes": [(_OUTCOMES[n], n) for n in outcomes] if len(outcomes) > 1 else [],
    }


def shorten(text: str, longest: int) -> str:
    """The text, cut in the middle so that its end can be read: that is where the question is."""
    if len(text) <= longest:
        return text
    head = longest * 2 // 3
    return f"{text[:head]} … {text[len(text) - (longest - head) :]}"


def _card(sample: Sample, longest: int) -> dict[str, Any]:
    row = sample.row
    answers = row["by_protocol"]
    protocol, told = next(iter(answers.items()))
    targets = row["targets"] if isinstance(row["targets"], list) else [row["targets"]]
    targets = [str(target) for target in targets]
    inputs, prediction = str(row["inputs"]), str(told["prediction"])
    choices = [
        {
            "text": shorten(str(choice), _SHORT),
            "value": f"{value:.2f}",
            "chosen": str(choice) == prediction,
            "right": str(choice) in targets,
        }
        for choice, value in zip(row.get("choices") or [], told.get("values") or [], strict=False)
    ]
    others = [
        f"{name}: {shorten(str(other['prediction']), 80)} ({outcome(other['score'])})"
        for name, other in answers.items()
        if str(other["prediction"]) != prediction
    ]
    return {
        "title": f"{sample.dataset} · {sample.prompt}",
        "about": f"{sample.checkpoint.label} · {sample.shots} shots · example {row['index']}"
        f" · {protocol}",
        "short": shorten(inputs, _SHORT),
        "long": shorten(inputs, longest) if len(inputs) > _SHORT else "",
        "targets": [shorten(target, _SHORT) for target in targets],
        "prediction": shorten(prediction, _SHORT),
        "outcome": outcome(told["score"]),
        "score": f"{told['score']:.0f}" if outcome(told["score"]) == PARTLY else "",
        "choices": choices,
        "others": others,
    }
