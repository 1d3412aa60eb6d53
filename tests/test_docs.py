"""The pages of docs/ that show commands are run as they stand."""

import json
import os
import re
import shlex
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


@pytest.mark.slow
def test_add_a_method(tmp_path):
    output = play(DOCS / "add_a_method.md", tmp_path)
    assert "All weights are as computed by hand." in output
    found = {name: float(value) for name, value in re.findall(r'"([\w/]+)": ([\d.]+)', output)}
    assert found.keys() == {
        "weight/nli", "weight/arithmetic", "effective_share/nli", "effective_share/arithmetic",
        "geometric_mean",
    }  # fmt: skip
    shares = found["effective_share/nli"], found["effective_share/arithmetic"]
    np.testing.assert_allclose(sum(shares), 1.0, rtol=1e-5)
    run = tmp_path / "runs" / "geometric_mean"
    told = json.loads((run / "method.json").read_text())
    assert told == {"method": "GeometricMean", "options": {"floor": 0.01}}
    assert (run / "report.html").exists()


def own_methods():
    from mtl_jax.balance.balance_config import BalanceConfig
    from mtl_jax.balance.method import METHODS

    BalanceConfig()  # registers them
    own = {n: k for n, k in METHODS.items() if k.__module__.startswith("mtl_jax.balance.")}
    return dict(sorted(own.items()))


def defaults(kind):
    """Field -> default as Gin writes it."""
    import dataclasses

    from mtl_jax.config_types import format_value

    instance = kind()
    return {f.name: format_value(getattr(instance, f.name)) for f in dataclasses.fields(kind)}


def test_methods_page_has_every_method_with_its_fields():
    from mtl_jax.balance.method import GRAM, LOSSES, LOSSES_AFTER, REFERENCE

    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, re.MULTILINE))
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", page, re.MULTILINE | re.DOTALL))
    methods = own_methods()
    assert sorted(rows) == list(methods)
    for name, kind in methods.items():
        sees = "gradients" if GRAM in kind.needs else "losses" if LOSSES in kind.needs else None
        learns = "observe" in vars(kind)
        assert rows[name] == (sees or ("past losses" if learns else "nothing"))
        row = re.search(rf"^\| `{name}` .*", page, re.MULTILINE)[0]
        assert ("a forward pass after" in row) == (LOSSES_AFTER in kind.needs)
        assert ("of a reference" in row) == (REFERENCE in kind.needs)
        stated = dict(re.findall(rf"`{name}\.(\w+) = ([^`]+)`", sections[name]))
        assert stated == defaults(kind)
        assert ("No fields" in sections[name]) == (not stated)
        has_rates = (
            "It has rates" in sections[name] or "mixture rates for a second" in sections[name]
        )
        assert hasattr(kind, "rates") == has_rates


def test_methods_page_has_every_field_of_balance():
    from mtl_jax.balance import balance_config

    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `Balance\.(\w+)` \| `([^`]+)` \| (.*) \|$", page, re.MULTILINE)
    assert {name: value for name, value, _ in rows} == defaults(balance_config.BalanceConfig)
    text = {name: what for name, _, what in rows}
    for field, values in (
        ("by", balance_config.BY),
        ("groups", balance_config.GROUPS),
        ("reduction", balance_config.REDUCTIONS),
        ("rescale", balance_config.RESCALES),
    ):
        default = defaults(balance_config.BalanceConfig)[field]
        assert all(f"'{value}'" in text[field] + default for value in values)
    ways = re.findall(r"^\| `'(\w+)'` \|", page, re.MULTILINE)
    assert ways == list(balance_config.TASK_GRADIENTS)


def test_methods_page_names_what_methods_log():
    """The names are those that the methods themselves give for a batch of two tasks."""
    import jax
    import jax.numpy as jnp

    from mtl_jax.balance.method import GRAM, Observations

    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    logged = page[page.index("## What is logged") : page.index("## Edge cases")]
    ones, names = jnp.ones(2), ("a", "b")
    seen = Observations(
        step=jnp.int32(0), tokens=ones, shares=ones / 2, losses=ones, correct=ones,
        gram=jnp.eye(2)[None], reference=ones, rng=jax.random.key(0), names=names,
    )  # fmt: skip
    for name, kind in own_methods().items():
        given = {"source": ("a",), "target": ("b",)} if name == "TransferObjective" else {}
        method = kind(**given)
        logs = method.weights(method.init(2, 1), seen)[2]
        for column, value in logs.items():
            shown = column if jnp.ndim(value) == 0 else f"{column}/TASK"
            where = "methods of gradients" if GRAM in kind.needs else name
            assert re.search(rf"`{shown}`[^;:]*\({where}\)", logged), column


def test_commands_of_the_methods_page_load(tmp_path, monkeypatch):
    from mtl_jax import cli, config

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "doremi").mkdir(parents=True)
    rates = config.rates_text({"embedded_nli_true_or_false": 1.0})
    (tmp_path / "runs" / "doremi" / "rates.gin").write_text(rates)
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    commands = [code for _, language, code in _BLOCK.findall(page) if language == "sh"]
    assert len(commands) == 2
    loaded = [
        config.load_args(cli.parse(shlex.split(code.replace("\\\n", ""))[1:])) for code in commands
    ]
    assert loaded[0].balance.method == "PCGrad"
    assert loaded[1].mixture.rates == {"embedded_nli_true_or_false": 1.0}
    assert loaded[1].mixture.name == loaded[1].data.mixture == "reweighted"
