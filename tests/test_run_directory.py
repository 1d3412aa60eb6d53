"""The run directory: claimed without damage, written whole, and honest about the storage."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mtl_jax import run_directory, storage
from mtl_jax.errors import UserError
from mtl_jax.run_directory import RunDirectory


def test_create_makes_the_folder_and_takes_it_again(tmp_path):
    run = RunDirectory(tmp_path / "a" / "b").create()
    assert not run.is_run()
    run.write_text("config.gin", "T5.emb_dim = 4\n")
    assert RunDirectory(str(tmp_path / "a" / "b")).create().is_run()
    assert [path.name for path in run.path.iterdir()] == ["config.gin"], "nothing else is left"


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_file_in_the_way_is_told_and_untouched(tmp_path, below):
    (tmp_path / "run").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"run is a file"):
        RunDirectory(tmp_path / "run" / below).create()
    assert (tmp_path / "run").read_text(encoding="utf-8") == "mine"


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds no run \(for example thesis.tex\)"):
        RunDirectory(tmp_path).create()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("path", ["", "gs://bucket/run"])
def test_no_folder_at_all(path):
    with pytest.raises(UserError, match=r"Run\.directory"):
        RunDirectory(path)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left on the device"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_refusals_of_the_system_are_told(tmp_path, monkeypatch, number, message):
    """As root no permission bit binds, hence the refusal is simulated."""

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    run = RunDirectory(tmp_path / "run")
    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with pytest.raises(UserError, match=f"make the run directory.*{message}"):
        run.create()
    monkeypatch.undo()
    run.create()
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=f"write to the run directory.*{message}"):
        run.create()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_read_only_parent_is_told(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="no permission"):
        RunDirectory(tmp_path / "run").create()


def test_a_file_size_limit_is_a_real_refusal(tmp_path):
    """The kernel itself refuses (RLIMIT_FSIZE); the earlier content survives."""
    program = (
        "import resource, signal, sys\n"
        "from mtl_jax.errors import UserError\n"
        "from mtl_jax.run_directory import RunDirectory\n"
        "run = RunDirectory(sys.argv[1]).create()\n"
        "run.write_text('config.gin', 'old')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
        "try:\n"
        "    run.write_text('config.gin', 'x' * 20000)\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.stdout.startswith("Could not write config.gin in ")
    assert os.strerror(errno.EFBIG) in done.stdout
    assert {p.name: p.read_text() for p in (tmp_path / "run").iterdir()} == {"config.gin": "old"}


def test_a_kill_between_writing_and_moving_leaves_the_old_file(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path).create()
    run.write_text("config.gin", "old")
    monkeypatch.setattr(storage.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.write_text("config.gin", "new")
    assert (tmp_path / "config.gin").read_text(encoding="utf-8") == "old"


def test_storage_errors_leave_other_errors_alone(tmp_path):
    with pytest.raises(ZeroDivisionError), storage.storage_errors("divide", tmp_path):
        _ = 1 / 0
    with (
        pytest.raises(UserError, match=r"Could not write in .*: no space left"),
        storage.storage_errors("write", tmp_path),
    ):
        # Tensorstore hides the operating system's refusal in the text.
        raise ValueError(f"UNKNOWN: Error writing '/x': [OS error 28: {os.strerror(28)}]")


def test_other_processes_of_a_job_write_nothing(tmp_path):
    run = RunDirectory(tmp_path / "run", primary=False).create()
    run.write_text("config.gin", "x")
    assert run.freeze_task_ids(["a", "b"]) == {"a": 1, "b": 2}
    assert not (tmp_path / "run").exists()


def test_task_ids_are_frozen_by_name(tmp_path):
    assert RunDirectory(tmp_path).create().freeze_task_ids(["b", "a"]) == {"b": 1, "a": 2}
    # Tasks added in front, in another order and with one left out: known ids stay.
    again = RunDirectory(tmp_path).freeze_task_ids(["c", "a"])
    assert again == {"b": 1, "a": 2, "c": 3}
    assert json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8")) == again
    assert RunDirectory(tmp_path).freeze_task_ids([]) == again


@pytest.mark.parametrize("text", ['{"a": 1, "b": 1}', '{"a": 0}', "[1]", '{"a": 1'])
def test_damaged_task_ids_are_told_and_untouched(tmp_path, text):
    (tmp_path / "tasks.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"tasks\.json is damaged"):
        RunDirectory(tmp_path).freeze_task_ids(["c"])
    assert (tmp_path / "tasks.json").read_text(encoding="utf-8") == text


def test_the_command_file_reruns_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MTL_JAX_DATA", "/data folder")
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(tmp_path / "run").create()
    program = "import os, sys; print(sys.argv[1:], os.environ['MTL_JAX_DATA'], os.getcwd())"
    arguments = ["--gin.Optimizer.schedule=constant * rsqrt_decay", "it's", "$HOME"]
    path = run.write_command([sys.executable, "-c", program, *arguments])
    monkeypatch.delenv("MTL_JAX_DATA")
    done = subprocess.run(
        [shutil.which("sh"), str(path)], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.strip() == f"{arguments} /data folder {tmp_path}"

    run.write_command(["mtl-jax", "train", "--gin.Run.steps=5"])
    run.write_command(["mtl-jax", "train", "--gin.Run.steps=5"])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("mtl-jax train --gin.Run.steps=5")
    assert lines[1].startswith("# until ")
    assert program.split(";")[0] in lines[1]


def test_versions_do_not_import_tensorflow():
    program = (
        "import json, sys; from mtl_jax.run_directory import versions; "
        "print(json.dumps([versions(), sorted(m for m in sys.modules if m in "
        "('tensorflow', 'seqio', 'gin'))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    found, heavy = json.loads(done.stdout)
    assert heavy == []
    assert found["jax"] == jax.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["device_kind"] == "cpu"
    assert {"jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "seqio"} <= found.keys()


def test_versions_without_git(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(run_directory.subprocess, "run", missing)
    assert run_directory.versions()["revision"] is None


def test_model_info_counts_parameters_and_bytes_per_device():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shapes = {
        "encoder": {"wi": jax.ShapeDtypeStruct((3, 8, 16), jnp.float32)},
        "scale": jax.ShapeDtypeStruct((8,), jnp.bfloat16),
    }
    axes = {"encoder": {"wi": ("layers", "embed", "mlp")}, "scale": ("embed",)}
    shardings = {
        "encoder": {"wi": NamedSharding(mesh, P(None, "fsdp", "tensor"))},
        "scale": NamedSharding(mesh, P()),
    }
    lines = run_directory.model_info(shapes, axes, shardings).splitlines()
    table = [[cell.strip() for cell in line.split("  ") if cell] for line in lines]
    assert table[0] == [
        "parameter", "shape", "dtype", "logical axes", "mesh axes", "bytes per device",
    ]  # fmt: skip
    # 3 * 8 * 16 = 384 numbers of 4 bytes over 8 devices.
    assert table[2] == [
        "encoder/wi", "3 x 8 x 16", "float32", "layers, embed, mlp", "-, fsdp, tensor", "192",
    ]  # fmt: skip
    assert table[3] == ["scale", "8", "bfloat16", "embed", "-", "16"]
    assert lines[-1] == "392 parameters in 2 tensors, 1,552 bytes, 208 bytes per device"


def test_the_compile_cache_lies_beside_the_runs(tmp_path, monkeypatch):
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    try:
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        folder = run_directory.enable_compile_cache(tmp_path / "runs" / "one")
        assert folder == str(tmp_path / "runs" / ".jax_cache")
        assert jax.config.jax_compilation_cache_dir == folder
        assert run_directory.enable_compile_cache(tmp_path / "runs" / "one", enabled=False) is None
        assert jax.config.jax_compilation_cache_dir is None
        # Who has one for all runs says so in JAX's own way.
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/cache")
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
        run_directory.enable_compile_cache(tmp_path / "runs" / "one")
        assert jax.config.jax_compilation_cache_dir == "gs://bucket/cache"
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 7.0
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
