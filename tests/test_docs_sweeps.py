"""docs/sweeps.md is run as it stands."""

import json
import re

import pytest
from test_docs import DOCS, play

from mtl_jax.sweep_config import SweepConfig
from mtl_jax.sweep_files import RESULT_COLUMNS

PAGE = DOCS / "sweeps.md"


@pytest.mark.slow
def test_sweeps(tmp_path):
    output = play(PAGE, tmp_path)
    assert "A customer writes: The price on the bill is wrong. It is about" in output or (
        "A customer writes: I was charged twice this month. It is about" in output
    )
    folder = tmp_path / "runs" / "tickets_sweep"
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert all(set(row) == set(RESULT_COLUMNS) for row in rows)
    assert {row["prompt"] for row in rows} == {"which desk", "it is about", "team of three"}
    assert {row["checkpoint"] for row in rows} == {"tickets@30", "tickets@60"}
    assert {row["shots"] for row in rows} == {0, 2}
    assert {row["protocol"] for row in rows} >= {"t0", "mean_token", "pmi", "lm_eval", "majority"}
    assert {row["n"] for row in rows} == {9}
    page = (folder / "report.html").read_text(encoding="utf-8")
    for title in ("Checkpoints side by side", "Protocols side by side", "Examples in the input"):
        assert title in page
    assert "Trained on, so not zero-shot: tickets" in page
    assert (tmp_path / "runs" / "together" / "results.md").exists()
    table = output[output.rindex("checkpoint") :]
    assert re.search(r"tickets@60 +0 +t0 +tickets\* +accuracy +3 ", table)


def test_names_of_the_page_exist():
    page = PAGE.read_text(encoding="utf-8")
    fields = set(re.findall(r"`Sweep\.(\w+)", page)) | set(re.findall(r"^Sweep\.(\w+)", page, re.M))
    assert fields <= set(SweepConfig.__dataclass_fields__)
    columns = re.search(r"has the columns (.*?)\. Any tool", page, re.DOTALL)[1]
    assert tuple(re.findall(r"`(\w+)`", columns)) == RESULT_COLUMNS
