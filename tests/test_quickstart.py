"""The quickstart run as a new user starts it; the shipped Gin file is the test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

RANKED = ("sentiment", "nli", "dialogue", "topic")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(run directory, standard output) of the whole quickstart: some minutes."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "mtl_jax", "train", "--gin_file=gin/runs/quickstart.gin"]
    # The tests compile without optimisation (conftest.py); a user does not.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "quickstart", done.stdout


def results(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]


def means(rows: list[dict], *, step: int, unseen: bool) -> dict[str, float]:
    """Trained family -> mean over prompts of accuracy or exact match (`em` for QA)."""
    values: dict[str, list[float]] = {}
    for row in rows:
        trained_family = row["family"] not in ("paraphrase", "word_sense")
        if (
            row["metric"] in ("accuracy", "exact_match", "em")
            and row["step"] == step
            and trained_family
            and row["trained"] != unseen
        ):
            values.setdefault(row["family"], []).append(row["value"])
    return {family: float(np.mean(of_family)) for family, of_family in values.items()}


@pytest.mark.slow
def test_learns_the_trained_families(finished):
    run, _ = finished
    last = max(row["step"] for row in results(run))
    by_family = means(results(run), step=last, unseen=False)
    assert len(by_family) >= 8
    assert np.mean(list(by_family.values())) >= 85.0, by_family


@pytest.mark.slow
def test_unseen_prompts_beat_chance_and_the_untrained_model(finished):
    run, _ = finished
    rows = results(run)
    last = max(row["step"] for row in rows)
    trained, untrained = (means(rows, step=step, unseen=True) for step in (last, 0))
    assert trained.keys() == untrained.keys()
    # 20 points is four standard errors of 50 examples of one prompt at chance 1/2 or less.
    for family, value in trained.items():
        assert value >= untrained[family] + 20.0, family
    chance = {row["family"]: row["value"] for row in rows if row["metric"] == "chance"}
    for family in RANKED:
        assert trained[family] >= chance[family] + 20.0, family


@pytest.mark.slow
def test_says_where_everything_is(finished):
    run, output = finished
    assert "embedded_sentiment" in output
    assert "untrained" in output
    assert f"Report: {Path('runs') / 'quickstart' / 'report.html'}" in output
    assert (run / "report.html").stat().st_size > 10_000
    ledger = json.loads((run / "ledger.json").read_text())[-1]
    # Each activity is rounded to a millisecond.
    assert sum(ledger["seconds"].values()) == pytest.approx(ledger["wall"], abs=0.02)
