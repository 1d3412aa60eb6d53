"""The pages of docs/ that show commands are run as they stand."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parent.parent / "docs"
# A block is a file where the text before it ends or begins its last paragraph with `name.ext`.
_BLOCK = re.compile(r"((?:[^\n]+\n)+)\n```(\w+)\n(.*?)```", re.DOTALL)
_FILE = re.compile(r"`([\w.]+\.(?:py|gin|jsonl|tsv))`(?::| says| shows)")


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
    output = notebook = ""
    for paragraph, language, code in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "sh":
            done = subprocess.run(
                ["bash", "-e", "-c", code],
                cwd=folder, env=environment, capture_output=True, text=True, timeout=500,
            )  # fmt: skip
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
            output += done.stdout
        elif names := _FILE.findall(paragraph):
            (folder / names[0]).write_text(code, encoding="utf-8")
        else:  # to be typed in a notebook
            notebook += code
    if notebook:
        done = subprocess.run(
            [sys.executable, "-c", notebook],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, f"{notebook}\n{done.stdout}\n{done.stderr}"
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


def save_hugging_face(family, folder):
    """A tiny random model of a family with a tokenizer, as `transformers` saves them."""
    import hf_models
    import torch
    import transformers

    from mtl_jax.tasks.embedded import VOCABULARY_FILE

    if family == "byt5":
        network, words = hf_models.tiny("byt5"), transformers.ByT5Tokenizer()
    else:
        network = hf_models.tiny(family, vocab_size=640)
        with torch.no_grad():
            # Neither unknown tokens nor rows without a token: the two libraries write them
            # differently.
            for row in (2, slice(606, 640)):
                network.lm_head.weight[row] = 0.0
        words = transformers.T5Tokenizer.from_pretrained(_vocabulary(VOCABULARY_FILE, folder))
    network.save_pretrained(folder / "my_t5")
    words.save_pretrained(folder / "my_t5")


def _vocabulary(file, folder):
    place = folder / "vocabulary"
    place.mkdir()
    shutil.copy(file, place / "spiece.model")
    (place / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0}))
    return place


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "t5_1_1", "mt5", "umt5", "byt5"])
def test_checkpoints(family, tmp_path):
    pytest.importorskip("transformers")
    save_hugging_face(family, tmp_path)
    output = play(DOCS / "checkpoints.md", tmp_path)
    compared = [line for line in output.splitlines() if re.match("(True|False) ", line)]
    assert len(compared) == 4
    assert all(line.startswith("True ") for line in compared), output
    read = lambda name: [json.loads(x) for x in (tmp_path / name).read_text().splitlines()]  # noqa: E731
    rows, before = read("in.jsonl"), read("before.jsonl")
    assert [{k: v for k, v in row.items() if k != "prediction"} for row in before] == rows
    assert all(np.isfinite(row["score"]) for row in read("scores.jsonl"))
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("my_t5", "my_t5_tuned")]
    assert weights[0] != weights[1]
    configs = [
        json.loads((tmp_path / n / "config.json").read_text()) for n in ("my_t5", "my_t5_tuned")
    ]
    for name in ("model_type", "eos_token_id", "initializer_factor", "transformers_version"):
        assert configs[0][name] == configs[1][name]
    assert (tmp_path / "my_t5_tuned" / "tokenizer_config.json").exists()
