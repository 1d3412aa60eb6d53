"""`mtl-jax infer`: every line once and in order, whatever kills it; mistakes are told early."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import loadable
import numpy as np
import pytest

import mtl_jax
from mtl_jax import cli, infer

ROWS = [
    {"inputs": "hello", "targets": "a", "id": 1},
    {"inputs": "a longer input é", "targets": "bc", "extra": {"kept": [1, None]}},
    {"inputs": "b", "targets": ["x", "yz"]},
    {"inputs": "", "targets": ""},
    *[{"inputs": "x" * n, "targets": "y"} for n in range(9)],
]
LOAD = infer.inference.load
SMALL = ["--gin.Infer.batch_size=2", "--gin.Infer.window=2", "--gin.Generate.max_length=6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return loadable.save(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def loaded(folder):
    return mtl_jax.load(folder)


@pytest.fixture
def run(folder, loaded, tmp_path, monkeypatch):
    """Runs the command on lines in a temporary folder, with a model that is loaded once."""
    monkeypatch.setattr(infer.inference, "load", lambda *args, **options: loaded)

    def call(*flags, lines=None, checkpoint=folder, output="out.jsonl"):
        if lines is not None:
            text = "".join(
                line if isinstance(line, str) else f"{json.dumps(line)}\n" for line in lines
            )
            (tmp_path / "in.jsonl").write_text(text, encoding="utf-8")
        paths = [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / output}"]
        return cli.main(["infer", f"--checkpoint={checkpoint}", *paths, *flags])

    return call


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_generated_rows_are_the_rows_with_predictions(run, loaded, tmp_path, capsys):
    assert run(*SMALL, lines=ROWS) == 0
    texts = loaded.generate([row["inputs"] for row in ROWS], max_length=6)
    expected = [row | {"prediction": text} for row, text in zip(ROWS, texts, strict=True)]
    assert read(tmp_path / "out.jsonl") == expected
    assert f"{len(ROWS)} rows written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.jsonl",
        "out.jsonl",
        "out.jsonl.job.json",
    ]


def test_scores_of_one_and_of_several_targets(run, loaded, tmp_path):
    assert run("--mode=score", "--gin.Infer.batch_size=4", lines=ROWS) == 0
    for row, out in zip(ROWS, read(tmp_path / "out.jsonl"), strict=True):
        (score,) = loaded.score([row["inputs"]], [row["targets"]])
        assert out == row | {"score": out["score"]}
        np.testing.assert_allclose(out["score"], score, rtol=1e-4)


def test_beams_prefixes_and_log_probabilities(run, loaded, tmp_path):
    flags = [
        *(
            "--gin.Generate.method=beam",
            "--gin.Generate.num_beams=3",
            "--gin.Generate.num_return=2",
        ),
        *("--gin.Generate.max_length=5", "--gin.Infer.log_probs=True"),
    ]
    rows = [{"inputs": "hello", "prefix": "ab"}, {"inputs": "b"}]
    assert run(*flags, lines=rows) == 0
    found = read(tmp_path / "out.jsonl")
    texts = loaded.generate(
        ["hello", "b"],
        prefixes=["ab", ""],
        method="beam",
        num_beams=3,
        num_return=2,
        max_length=5,
    )
    assert [row["predictions"] for row in found] == texts
    for row in found:
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert [len(values) > 0 for values in row["log_probs"]] == [True, True]


class Killed(BaseException):
    """Stands for kill -9: nothing of the program runs after it."""


@pytest.mark.parametrize("mode", ["generate", "score", "sample"])
def test_a_kill_at_any_write_loses_and_repeats_nothing(run, tmp_path, monkeypatch, mode):
    flags = {
        "generate": SMALL,
        "score": ["--mode=score", *SMALL[:2]],
        "sample": [*SMALL, "--gin.Generate.method=sample"],
    }[mode]
    bad = ["nonsense\n", *ROWS[:5], "\n", '{"inputs": 3}\n', *ROWS[5:], "[]\n"]
    flags = [*flags, "--gin.Infer.on_bad_line=skip"]
    assert run(*flags, lines=bad, output="whole.jsonl") == 0
    whole = {
        name: (tmp_path / f"whole.jsonl{name}").read_bytes() for name in ("", ".skipped.jsonl")
    }
    assert [row["line"] for row in read(tmp_path / "whole.jsonl.skipped.jsonl")] == [1, 8, 17]

    drawn, plain = random.Random(0), infer.Job._append

    def killing(self, path, records):
        size = path.stat().st_size if path.exists() else 0
        plain(self, path, records)
        if drawn.random() < 0.6:  # in the middle of the write, or right behind it
            os.truncate(path, drawn.randint(size, path.stat().st_size))
            raise Killed

    kills = 0
    monkeypatch.setattr(infer.Job, "_append", killing)
    while True:
        try:
            assert run(*flags) == 0
            break
        except Killed:
            kills += 1
    assert kills >= 3
    for name, content in whole.items():
        assert (tmp_path / f"out.jsonl{name}").read_bytes() == content


def test_done_work_is_not_done_again(run, tmp_path, capsys, monkeypatch):
    assert run(*SMALL, lines=ROWS) == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    monkeypatch.setattr(infer.Job, "_compute", lambda *_: pytest.fail("computed again"))
    assert run(*SMALL) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert f"{len(ROWS)} rows are there already" in capsys.readouterr().err


def test_a_bad_line_stops_with_its_number_and_keeps_the_rows_before_it(run, tmp_path, capsys):
    lines = [*ROWS[:3], '{"inputs": "cut off\n', *ROWS[3:]]
    assert run(*SMALL, lines=lines) == 1
    error = capsys.readouterr().err
    assert "in.jsonl, line 4: not JSON" in error
    assert "Infer.on_bad_line=skip" in error
    assert len(read(tmp_path / "out.jsonl")) == 3
    # As the message says: the same output goes on, and passes over it.
    assert run(*SMALL, "--gin.Infer.on_bad_line=skip") == 0
    skipped = [row["inputs"] for row in read(tmp_path / "out.jsonl")]
    assert skipped == [row["inputs"] for row in ROWS]

    (tmp_path / "out.jsonl").unlink()
    assert run(*SMALL, lines=lines) == 1
    lines[3] = ROWS[0]
    assert run(*SMALL, lines=lines) == 0  # mended, it goes on behind them
    assert [row["inputs"] for row in read(tmp_path / "out.jsonl")] == [r["inputs"] for r in lines]


@pytest.mark.parametrize(
    ("line", "reason", "flags"),
    [
        ("[1]\n", "not a JSON object", []),
        ('{"targets": "a"}\n', 'the field "inputs" must be a text', []),
        ('{"inputs": "a", "prefix": 3}\n', 'the field "prefix" must be a text', []),
        ('{"inputs": "a", "id": NaN}\n', "not JSON (NaN is no number", []),
        ('{"inputs": "\\ud800"}\n', "not JSON", []),
        ('{"inputs": "a", "prediction": ""}\n', '"prediction" would be overwritten', []),
        ('{"inputs": "a"}\n', '"targets" must be a text or a list', ["--mode=score"]),
        ('{"inputs": "a", "targets": []}\n', '"targets" must be a text or a', ["--mode=score"]),
        ('{"inputs": "a", "targets": [1]}\n', '"targets" must be a text or a', ["--mode=score"]),
        ('{"inputs": "\xe9"}\n', "not JSON", ["latin-1"]),
    ],
)
def test_bad_lines_are_skipped_with_their_reason(run, tmp_path, line, reason, flags):
    good = {"inputs": "a", "targets": "b"}
    run_flags = [flag for flag in flags if flag.startswith("--")]
    (tmp_path / "in.jsonl").write_bytes(
        f"{json.dumps(good)}\n".encode() + line.encode("latin-1") + f"{json.dumps(good)}\n".encode()
    )
    assert run("--gin.Infer.on_bad_line=skip", *run_flags) == 0
    (skipped,) = read(tmp_path / "out.jsonl.skipped.jsonl")
    assert skipped["line"] == 2
    assert reason in skipped["error"]
    assert len(read(tmp_path / "out.jsonl")) == 2


def test_an_output_of_an_older_checkpoint_is_not_mixed(run, loaded, tmp_path, capsys, monkeypatch):
    assert run(*SMALL, lines=ROWS) == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    monkeypatch.setattr(loaded, "step", 9)
    assert run(*SMALL) == 1
    assert "checkpoint of step 7, not 9: set --gin.Infer.step=7" in capsys.readouterr().err
    monkeypatch.setattr(loaded, "step", 7)
    assert run(*SMALL, "--gin.Infer.step=7") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_an_output_of_something_else_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text("precious\n")
    assert run(*SMALL, lines=ROWS) == 1
    assert "was not written by mtl-jax infer" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"


def test_an_output_of_other_options_or_inputs_is_left_alone(run, tmp_path, capsys):
    assert run(*SMALL, lines=ROWS) == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    assert run(*SMALL[:2], "--gin.Generate.max_length=9") == 1
    assert "was begun with Generate.max_length = 6, not 9" in capsys.readouterr().err
    assert run(*SMALL, lines=[{"inputs": "other"}, *ROWS[1:]]) == 1
    assert "in.jsonl, line 1 is not the row that" in capsys.readouterr().err
    assert run(*SMALL, lines=ROWS[:5]) == 1
    assert "holds 13 rows but" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_mistakes_in_the_flags_are_told_before_anything_is_loaded(
    run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(infer.inference, "load", lambda *_, **__: pytest.fail("loaded"))
    for flags, message in (
        (["--gin.Infer.batch_size=0"], "Infer.batch_size must be at least 1"),
        (["--gin.Infer.on_bad_line=shrug"], "Infer.on_bad_line must be one of stop, skip"),
        (["--gin.Infer.dtype=int8"], "Infer.dtype must be"),
        (["--gin.Generate.metod=beam"], "Generate has no field 'metod'"),
        (["--mode=score", "--gin.Generate.max_length=3"], "--mode score generates nothing"),
        (["--gin.Infer.step=-2"], "Infer.step must be a step"),
    ):
        assert run(*flags, lines=ROWS) == 1
        assert message in capsys.readouterr().err
    assert run(lines=ROWS, output="nowhere/out.jsonl") == 1
    assert "must be a file in a folder that exists" in capsys.readouterr().err
    assert run(lines=ROWS, output="in.jsonl") == 1
    assert "--output must not be the --input file" in capsys.readouterr().err
    (tmp_path / "in.jsonl").unlink()
    assert run() == 1
    assert "in.jsonl is not a file" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_checkpoint_that_is_not_there_leaves_no_output(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(infer.inference, "load", LOAD)
    assert run(lines=ROWS, checkpoint=tmp_path / "nowhere") == 1
    assert "nowhere does not exist" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_cut_inputs_are_told(run, loaded, capsys, monkeypatch):
    monkeypatch.setattr(loaded, "inputs_length", 4)
    monkeypatch.setattr(loaded, "truncated", 0)
    assert run("--gin.Generate.max_length=2", "--gin.Infer.inputs_length=4", lines=ROWS) == 0
    assert "7 inputs were cut to 4 tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_kill_minus_nine(folder, tmp_path):
    """The real thing, at random moments."""
    lines = "".join(json.dumps({"inputs": f"row {n}"}) + "\n" for n in range(2000))
    (tmp_path / "in.jsonl").write_text(lines)

    def command(output):
        return [
            *(sys.executable, "-m", "mtl_jax", "infer", f"--checkpoint={folder}", *SMALL),
            *(f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / output}"),
        ]

    subprocess.run(command("whole.jsonl"), check=True, capture_output=True)
    whole, output = (tmp_path / "whole.jsonl").read_bytes(), tmp_path / "out.jsonl"
    size = lambda: output.stat().st_size if output.exists() else 0  # noqa: E731
    drawn, kills = random.Random(0), 0
    for _ in range(20):
        process = subprocess.Popen(command("out.jsonl"), stderr=subprocess.DEVNULL)
        enough = size() + drawn.randint(1, len(whole) // 4)
        while process.poll() is None and size() < enough:
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        if process.wait() == 0:
            break
    assert kills >= 3
    assert output.read_bytes() == whole
