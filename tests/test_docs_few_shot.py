"""docs/few_shot.md is run as it stands, and its tables are those of the code."""

import json
import re

import pytest
from test_docs import DOCS, play

from mtl_jax.tasks.options import STYLES
from mtl_jax.tasks.prompted import VARIANTS

PAGE = DOCS / "few_shot.md"


@pytest.mark.slow
def test_few_shot(tmp_path):
    output = play(PAGE, tmp_path)
    shown = output[output.index("films_war_2shot_max200") :]
    assert re.search(r"Was \w+.* made in the war\?\n +(yes|no)\n", shown)
    assert "Was Nosferatu made in the war?" in shown
    assert "- no\n" in output
    assert re.search(r"\(A\) (yes|no)\n +\(B\) (yes|no)", output)
    assert "Metropolis | director | Fritz Lang && Metropolis | year | 1927" in output
    rows = (tmp_path / "runs" / "shots" / "results.jsonl").read_text().splitlines()
    values = {(row["task"], row["metric"], row["n"]) for row in map(json.loads, rows)}
    assert ("films_war_2shot_max200", "accuracy", 2) in values


def test_tables_of_the_page_are_complete():
    page = PAGE.read_text(encoding="utf-8")
    first = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert first == [*VARIANTS, *STYLES]
