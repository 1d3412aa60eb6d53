"""Protocols from end to end: what `mtl-jax sweep` writes against an independent PyTorch scorer."""

import json
import os
import subprocess
import sys

import hf_models
import numpy as np
import pytest
import seqio

from mtl_jax import sweep_files
from mtl_jax.protocols import PROTOCOLS

pytestmark = [pytest.mark.slow, pytest.mark.torch, pytest.mark.data]

# Shorter than some inputs, so that it matters where they are cut.
INPUTS_LENGTH, DECODE_LENGTH, ROWS = 48, 16, 20
RANKED = ("super_glue_cb_should_assume", "super_glue_copa_more_likely")
GENERATED = "wic_asked"
# WiC without answer choices, for the protocols that generate.
MODULE = """
from mtl_jax import metrics
from mtl_jax.tasks.data_folder import data_file, read_json_lines
from mtl_jax.tasks.prompted import add_prompted_tasks
from mtl_jax.tasks.prompts import Template
from mtl_jax.tasks.t5_vocabulary import t0_features

rows = list(read_json_lines(
    data_file("glue_superglue", "super_glue.wic", "validation.jsonl.gz"), ("word",)))
add_prompted_tasks(
    "wic", lambda split: rows, [Template("asked", "{{sentence1}} What is it? ||| {{word}}")],
    t0_features(), {"validation": len(rows)}, [metrics.exact_match], trained=False)
"""


@pytest.fixture(scope="module")
def hf_model():
    import torch

    model = hf_models.tiny("t5_1_1", vocab_size=32128)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)  # a token has some ten nats, as in a young model
    return model


@pytest.fixture(scope="module")
def swept(hf_model, data_folder, tmp_path_factory):
    """The cells of a sweep over the model by task: (facts, predictions, rows of the table)."""
    folder = tmp_path_factory.mktemp("protocols")
    hf_model.save_pretrained(folder / "model")
    vocabulary = data_folder / "vocab" / "spiece.model"
    (folder / "model" / "spiece.model").write_bytes(vocabulary.read_bytes())
    (folder / "wic_asked.py").write_text(MODULE)
    settings = {
        "Run.directory": str(folder / "sweep"),
        "Data.task_modules": ("mtl_jax.tasks.super_glue", "wic_asked"),
        "Sweep.checkpoints": (str(folder / "model"),),
        "Sweep.protocols": tuple(PROTOCOLS),
        "Eval.tasks": (*RANKED, GENERATED),
        "Eval.limit": ROWS,
        "Eval.inputs_length": INPUTS_LENGTH,
        "Eval.targets_length": 32,
        "Eval.max_decode_length": DECODE_LENGTH,
        "Eval.batch_size": 8,
    }
    gin = folder / "sweep.gin"
    gin.write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))
    result = subprocess.run(
        [sys.executable, "-m", "mtl_jax", "sweep", f"--gin_file={gin}"],
        env=os.environ | {"PYTHONPATH": str(folder), "MTL_JAX_DATA": str(data_folder)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    cells = {}
    for cell in sweep_files.cell_folders(folder / "sweep"):
        facts = sweep_files.read_facts(cell)
        lines = (cell / sweep_files.RESULTS).read_text().splitlines()
        cells[facts.task] = facts, sweep_files.predictions(cell), list(map(json.loads, lines))
    assert set(cells) == {*RANKED, GENERATED}
    return cells


@pytest.fixture(scope="module")
def witness(hf_model, data_folder):
    import protocol_witness

    vocabulary = data_folder / "vocab" / "spiece.model"
    return protocol_witness.Witness(hf_model, vocabulary, INPUTS_LENGTH, inputs_eos=False)


@pytest.mark.parametrize("task", RANKED)
def test_a_sweep_ranks_as_the_witness(task, swept, witness):
    import protocol_witness

    _, predictions, rows = swept[task]
    assert len(predictions) == ROWS
    examples = [(line["inputs"], line["choices"]) for line in predictions]
    for name in protocol_witness.RANKING:
        said = [line["by_protocol"][name] for line in predictions]
        # Values are written with six digits after the point.
        protocol_witness.assert_agrees(
            witness, name, examples, [of["values"] for of in said], tolerance=1e-4
        )
        right = []
        for line, of, (text, choices) in zip(predictions, said, examples, strict=True):
            assert of["prediction"] == choices[witness.chosen(name, text, choices)]
            right.append(of["prediction"] == line["targets"])
        (row,) = [r for r in rows if (r["protocol"], r["metric"]) == (name, "accuracy")]
        assert row["value"] == pytest.approx(100 * np.mean(right))
        assert (row["n"], row["truncated"] > 0) == (ROWS, True)


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (GENERATED, "generate"),
        (GENERATED, "flan"),
        (GENERATED, "tk_instruct"),
        (RANKED[0], "tk_instruct"),
    ],
)
def test_a_sweep_generates_as_the_witness(task, name, swept, witness, data_folder):
    _, predictions, rows = swept[task]
    # The random model writes sentinels; SeqIO's vocabulary, which the task has, puts spaces there.
    words = seqio.SentencePieceVocabulary(str(data_folder / "vocab" / "spiece.model"), 100)
    for line in predictions[:5]:
        expected = words.decode(witness.generate(name, line["inputs"], DECODE_LENGTH))
        assert line["by_protocol"][name]["prediction"] == expected
    found = {row["metric"] for row in rows if row["protocol"] == name}
    fixed = {"exact_match_sni", "rougeL_stemmed"}
    assert found == (fixed if name == "tk_instruct" else {"exact_match"})
