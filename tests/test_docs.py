"""The pages of docs/ that show commands are run as they stand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
# A block is a file where the text before it ends or begins its last paragraph with `name.ext`.
_BLOCK = re.compile(r"((?:[^\n]+\n)+)\n```(\w+)\n(.*?)```", re.DOTALL)
_FILE = re.compile(r"`([\w.]+\.(?:py|gin|jsonl|tsv))`(?::| says)")


def play(page, folder):
    """Writes the files and runs the commands of a page in the order in which they stand."""
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
        "COLUMNS": "100",
    }
    environment.pop("MTL_JAX_DATA", None)
    output = ""
    for paragraph, language, code in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "sh":
            done = subprocess.run(
                ["bash", "-e", "-c", code],
                cwd=folder, env=environment, capture_output=True, text=True, timeout=500,
            )  # fmt: skip
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
            output += done.stdout
        else:
            (name,) = _FILE.findall(paragraph)
            (folder / name).write_text(code, encoding="utf-8")
    return output


@pytest.mark.slow
def test_add_a_task(tmp_path):
    output = play(DOCS / "add_a_task.md", tmp_path)
    assert "Is this review good or bad? A warm and funny film." in output
    run = tmp_path / "runs" / "reviews"
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert {(row["task"], row["metric"], row["n"]) for row in rows} >= {("reviews", "accuracy", 2)}
    assert {row["step"] for row in rows} == {20}
    assert (run / "report.html").exists()
    assert "reviews" in output[output.index("Run directory") - 2000 :]
