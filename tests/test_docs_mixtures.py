"""docs/mixtures.md: its commands are run as they stand, its tables compared with the code."""

import dataclasses
import json
import re

import pytest
from test_docs import DOCS, play

from mtl_jax.data_config import CAPS, HOLD_OUT_BY, MixtureConfig

PAGE = DOCS / "mixtures.md"


@pytest.mark.slow
def test_mixtures(tmp_path):
    output = play(PAGE, tmp_path)
    # The parts have their weights; what is held out is told.
    parts = output[: output.index("Held out by Mixture.hold_out")]
    found = re.findall(r"^(embedded_\w+) +\S+ +\S+ +([\d.]+)%", parts, re.MULTILINE)
    weights = {"nli": 0.0, "qa": 0.0, "topic": 0.0, "sentiment": 0.0}
    for task, share in found:
        weights[task.split("_")[1]] += float(share)
    assert weights["nli"] == pytest.approx(50, abs=0.1)
    assert weights["qa"] + weights["topic"] == pytest.approx(30, abs=0.1)
    assert weights["sentiment"] == pytest.approx(20, abs=0.1)
    assert "embedded_nli_does_it_follow" not in dict(found)
    # Leave one out.
    assert ", suite_without_nli, seed 0" in output
    # The leak and its removal.
    assert "1 of 3 training examples in quiz overlap with 1 of 2 evaluation examples." in output
    (leak,) = [json.loads(line) for line in (tmp_path / "leaks.jsonl").read_text().splitlines()]
    assert (leak["task"], leak["row"]) == ("quiz", 0)
    (row,) = json.loads((tmp_path / "runs" / "clean" / "mixture.json").read_text())
    assert (row["examples"], row["excluded"], row["share"]) == (3, 1, 1.0)
    drawn = json.loads((tmp_path / "runs" / "clean" / "data.json").read_text())
    assert drawn["quiz"]["longest_input"] < 96


def test_the_page_names_every_field():
    text = PAGE.read_text(encoding="utf-8")
    fields = {field.name for field in dataclasses.fields(MixtureConfig)}
    named = set(re.findall(r"Mixture\.(\w+)", text))
    assert named <= fields
    assert fields - named <= {"tasks", "temperature", "max_epochs", "budget"}
    for word in ("temperature", "max_epochs", "budget", *CAPS, *HOLD_OUT_BY):
        assert word in text
