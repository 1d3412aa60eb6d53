"""The shape of the house: who imports whom, what the core never loads, how long things may be."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mtl_jax"

# docs/design.md: a room imports only rooms that stand later on this list. Entry pages come first
# (they see everything); pages of plain values and helpers, which import little, come last.
ORDER = (
    # Entry pages.
    *(
        "__main__",
        "cli",
        "compare",
        "sweep",
        "precompile",
        "train",
        "dry_run",
        "logbook",
        "starting",
        "build",
        "microbatches",
    ),
    *("tasks_main", "report_main", "represent", "infer", "decontaminate"),
    "guard",
    *("compare_config", "sweep_config", "config", "balance_log"),
    # TensorFlow is allowed here, and so in the entry pages.
    *("tasks", "data", "shards", "eval_reading", "effective_mixture", "mixtures", "reading"),
    *("caching", "sources", "packing", "vocabulary", "quiet_tensorflow"),
    # What uses the model stands before it.
    *("sweeps", "inference", "interop", "evaluate"),
    *("decode", "beam", "sampling", "hypotheses", "stop_strings", "buckets"),
    *("results", "protocols", "metrics", "eval_task", "placement", "overlap"),
    # The way of a batch.
    *(
        "fitting",
        "targets",
        "hlo",
        "step",
        "balanced",
        "objective",
        "balance",
        "sharing",
        "sharding",
    ),
    *("loss", "incremental", "model", "layers"),
    *("attention", "kernels", "optim", "host_memory"),
    # What a run leaves behind.
    *(
        "checkpoint",
        "checkpoint_manager",
        "checkpoint_fit",
        "checksums",
        "restore",
        "report",
        "sweep_report",
        "comparison_html",
        "report_html",
        "multitask_html",
    ),
    *("heat_map", "charts", "analysis", "tables", "run_directory"),
    "run_lock",
    *("sweep_files", "storage", "tokenizer", "preemption", "processes"),
    *("flops", "task_info", "data_config", "generate_config", "infer_config", "model_config"),
    *("checkpoint_config", "guard_config", "row_files"),
    *("precompile_config", "precompile_report"),
    *("run_config", "config_types", "patterns", "user_modules", "errors"),
)
MAY_LOAD_TENSORFLOW = {
    *("tasks", "data", "shards", "eval_reading", "effective_mixture", "mixtures", "reading"),
    *("caching", "sources", "vocabulary", "quiet_tensorflow"),
}
ENTRY_PAGES = {
    *(
        "__main__",
        "cli",
        "compare",
        "sweep",
        "precompile",
        "train",
        "dry_run",
        "logbook",
        "starting",
        "build",
        "microbatches",
    ),
    *("tasks_main", "report_main", "represent", "infer", "decontaminate"),
}
MOST_LINES = 500
MOST_FUNCTION_LINES = 80


def modules() -> dict[str, list[Path]]:
    """Returns the files of every room: mtl_jax/NAME.py, or all below mtl_jax/NAME/ or tasks/."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if name != "__init__":
            found.setdefault(name, []).append(path)
    found["tasks"] = sorted((ROOT / "tasks").rglob("*.py"))
    return found


ROOMS = modules()


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path: Path) -> Iterator[str]:
    """Yields the full names that a file imports, inside functions too, but not for types only."""

    def walk(node: ast.AST) -> Iterator[str]:
        if _is_type_checking(node):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    yield from walk(ast.parse(path.read_text()))


def rooms_imported(path: Path) -> set[str]:
    names = {full.split(".")[1] for full in imports(path) if full.startswith("mtl_jax.")}
    return names - {"__version__"}


def test_every_room_has_its_place():
    assert set(ROOMS) <= set(ORDER), "give the new room its place in ORDER"
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_later_rooms(room):
    for path in ROOMS[room]:
        for other in rooms_imported(path) & set(ORDER) - {room}:
            assert ORDER.index(other) > ORDER.index(room), f"{path} imports {other}"


def test_only_entry_pages_import_gin():
    for room, paths in ROOMS.items():
        for path in paths:
            names = {full.split(".")[0] for full in imports(path)}
            assert "gin" not in names or room in ENTRY_PAGES | {"config"}, path


def test_gin_folder_never_shadows_gin_config():
    assert not list((ROOT / "gin").rglob("*.py"))


def test_the_core_never_loads_tensorflow():
    core = [f"mtl_jax.{room}" for room in ROOMS if room not in MAY_LOAD_TENSORFLOW | ENTRY_PAGES]
    program = (
        "import importlib, json, sys\n"
        f"for name in {core!r}:\n"
        "    importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    loaded = json.loads(result.stdout.splitlines()[-1])
    assert "jax" in loaded
    for name in ("tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "torch"):
        assert name not in loaded


def test_every_import_is_declared():
    required = importlib.metadata.requires("mtl_jax") or []
    declared = {re.split(r"[^\w.-]", text)[0].lower().replace("-", "_") for text in required}
    owners = importlib.metadata.packages_distributions()
    for paths in ROOMS.values():
        for path in paths:
            for name in {full.split(".")[0] for full in imports(path)}:
                if name in sys.stdlib_module_names or name == "mtl_jax":
                    continue
                # A package of an extra need not be installed here; it goes by its own name then.
                known = owners.get(name, [name])
                distributions = {owner.lower().replace("-", "_") for owner in known}
                assert distributions & declared, f"{path} imports {name}: declare it in setup.py"


def python_files() -> list[Path]:
    folders = ("mtl_jax", "tasks", "tests", "benchmarks")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_files_and_functions_are_short():
    for path in python_files():
        text = path.read_text()
        assert text.count("\n") <= MOST_LINES, f"{path} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= MOST_FUNCTION_LINES, f"{path}: {node.name} has {lines} lines"


def test_names_say_what_is_inside():
    vague = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert not [path for path in python_files() if path.name in vague]
