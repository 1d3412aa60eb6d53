"""What is installed: lock files, metadata, and a wheel that works from another folder."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
LOCKS = {"3.11": "py311.txt", "3.12": "py312.txt", "3.13": "py312.txt"}


def pins(python: str) -> dict[str, Version]:
    """Returns name -> version of the lock file for this Python on Linux."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "os_name": "posix",
        "platform_python_implementation": "CPython",
    }
    found = {}
    for line in (ROOT / "requirements" / LOCKS[python]).read_text().splitlines():
        match = re.fullmatch(r"([\w.-]+)==([^ ;]+)(?: ; (.+))?", line)
        assert match or line.lstrip().startswith("#"), f"not a plain pin: {line}"
        if match and (not match[3] or Marker(match[3]).evaluate(environment)):
            assert match[1] not in found, f"{match[1]} is pinned twice"
            found[match[1]] = Version(match[2])
    return found


@pytest.mark.parametrize("python", LOCKS)
def test_lock_files_hold_what_setup_declares(python):
    locked = pins(python)
    for text in importlib.metadata.requires("mtl_jax"):
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": "test"}):
            name = canonicalize_name(requirement.name)
            assert locked[name] in requirement.specifier, f"{name}: run make lock"


def test_lock_files_avoid_the_wrong_jaxlib():
    assert pins("3.11")["jaxlib"] == Version("0.10.1")
    for python in LOCKS:
        assert pins(python)["jaxlib"] != Version("0.10.2")


@pytest.mark.parametrize("name", sorted(set(LOCKS.values())))
def test_lock_files_name_no_host(name):
    text = (ROOT / "requirements" / name).read_text()
    assert "://" not in text
    assert "--" not in text


def shipped_files() -> set[str]:
    """Returns the files of the checkout that an installation must have, by their place in it."""
    found = set()
    for folder, place in (
        ("mtl_jax", "mtl_jax"),
        ("gin", "mtl_jax/gin"),
        ("tasks", "mtl_jax/tasks"),
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                found.add(f"{place}/{path.relative_to(ROOT / folder).as_posix()}")
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the tree: no build folder is left in it or taken over."""
    source = tmp_path_factory.mktemp("source")
    for name in ("mtl_jax", "gin", "tasks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in (".py", ".toml", ".md", "", ".in"):
            shutil.copy(path, source)
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, source]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A new virtual environment with the wheel; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps"]
    subprocess.run([*install, "--no-index", wheel], check=True)
    # Plain paths: the .pth files there (an editable install of this checkout) are not followed.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    borrowed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    site = folder / f"lib/{version}/site-packages"
    (site / "borrowed.pth").write_text("\n".join(dict.fromkeys(borrowed)) + "\n")
    return folder


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    command = [installed / "bin" / words[0], *words[1:]]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.mark.slow
def test_wheel_has_every_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert shipped_files() <= names
    assert "mtl_jax/gin/__init__.py" not in names
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"mtl_jax"}
    assert any(name.endswith("LICENSE") for name in names)


@pytest.mark.slow
def test_wheel_is_what_runs(installed, tmp_path):
    program = (
        "import gin, mtl_jax, mtl_jax.tasks, mtl_jax.config as c\n"
        "print(mtl_jax.__file__, mtl_jax.tasks.__file__, c.package_gin_folder(), sep='\\n')\n"
        "gin.parse_config('')\n"  # gin-config, not our folder
    )
    for line in run(installed, tmp_path, "python", "-c", program).stdout.splitlines():
        assert Path(line).is_relative_to(installed.resolve()), line


@pytest.mark.slow
def test_wheel_lists_tasks(installed, tmp_path):
    shown = run(installed, tmp_path, "mtl-jax", "tasks").stdout
    assert len(shown.splitlines()) > 10


@pytest.mark.slow
def test_wheel_resolves_the_quickstart(installed, tmp_path):
    words = ("mtl-jax", "train", "--gin_file=runs/quickstart.gin", "--dry_run")
    shown = run(installed, tmp_path, *words).stdout
    assert "parameters" in shown
    assert not (tmp_path / "runs").exists()
