"""The command line: help, speed, usage errors, exit statuses, what the commands receive."""

import re
import subprocess
import sys
import types

import pytest

from mtl_jax import __version__, cli, config, quiet_tensorflow
from mtl_jax.errors import UserError


@pytest.fixture
def command(monkeypatch):
    """Puts a function in the place of `mtl-jax train`; returns a function to set it."""
    monkeypatch.setattr(config, "load_args", lambda args: None)
    monkeypatch.setattr(quiet_tensorflow, "load", lambda: None)

    def use(function):
        module = types.ModuleType("fake_train")
        module.main = function
        monkeypatch.setitem(sys.modules, "mtl_jax.train", module)

    return use


def usage_error(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_no_argument_prints_the_help(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    for name, known in cli.COMMANDS.items():
        assert re.search(rf"^    {name}\s", shown, re.MULTILINE)
        assert known.summary in " ".join(shown.split())


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"mtl-jax {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "no command 'trian'. Did you mean 'train'?"),
        (["train", "--gin_fil=x"], "unknown flag '--gin_fil=x'. Did you mean '--gin_file'?"),
        (["train", "--dry"], "mtl-jax train: unknown flag '--dry'."),
        (["train", "more"], "unknown argument 'more'"),
        (["train", "--gin_file"], "--gin_file: expected one argument"),
        (["--debug", "train"], "unknown flag '--debug'. Write it after the command."),
        (["--versio"], "unknown flag '--versio'. Did you mean '--version'?"),
        (["report"], "the following arguments are required: RUN_DIR"),
        (["report", "--gin.Run.steps=1", "a"], "unknown flag '--gin.Run.steps=1'"),
    ],
)
def test_usage_errors(capsys, argv, message):
    assert message in usage_error(capsys, *argv)


def test_flags_arrive(command):
    seen = []
    command(seen.append)
    argv = [
        "train",
        "--gin_file=a.gin",
        "--gin.Run.steps=3",
        "--gin_file",
        "b.gin",
        "--gin.Data.mixture=x=y z",
        "--gin_search_paths=one,two",
        "--gin_search_paths=three",
        "--dry_run",
    ]
    assert cli.main(argv) == 0
    (args,) = seen
    assert args.gin_file == ["a.gin", "b.gin"]
    assert args.gin_bindings == ["Run.steps=3", "Data.mixture=x=y z"]
    assert args.gin_search_paths == ["one", "two", "three"]
    assert args.dry_run
    assert not args.debug
    assert args.argv == argv


def test_defaults_are_not_shared_between_calls(command):
    seen = []
    command(seen.append)
    cli.main(["train", "--gin_file=a.gin", "--gin.Run.steps=3"])
    cli.main(["train"])
    assert (seen[1].gin_file, seen[1].gin_bindings, seen[1].dry_run) == ([], [], False)


def test_status_of_the_command_is_returned(command):
    command(lambda args: 5)
    assert cli.main(["train"]) == 5


def test_user_errors_are_one_line(command, capsys):
    def refuse(args):
        raise UserError("x.gin:3: no")

    command(refuse)
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err == "mtl-jax train: x.gin:3: no\n"
    assert cli.main(["train", "--debug"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("mtl-jax train: x.gin:3: no\n")


def test_defects_keep_their_traceback(command):
    def fail(args):
        raise RuntimeError("a defect")

    command(fail)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["train"])


def test_configuration_mistakes_are_told_before_the_command_is_imported():
    program = (
        "import sys\nfrom mtl_jax import cli\n"
        "status = cli.main(['train', '--gin.Run.stepz=1'])\n"
        "assert status == 1 and 'tensorflow' not in sys.modules\n"
    )
    result = run("-c", program)
    assert result.returncode == 0, result.stderr
    message = "mtl-jax train: --gin.Run.stepz: Run has no field 'stepz'. Did you mean 'steps'?"
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_interruption(command, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    command(interrupt)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "mtl-jax train: interrupted\n"


def run(*words: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=60, **kwargs
    )


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_imports_nothing_heavy(words):
    program = (
        "import sys\nfrom mtl_jax import cli\n"
        f"try:\n    cli.main({words!r})\nexcept SystemExit as done:\n    assert done.code == 0\n"
        "heavy = {'jax', 'tensorflow', 'seqio', 'numpy', 'gin', 'flax'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = run("-c", program)
    assert result.returncode == 0, result.stderr
    assert "--help" in result.stdout


def test_module_is_the_command():
    result = run("-m", "mtl_jax", "--version")
    assert (result.returncode, result.stdout) == (0, f"mtl-jax {__version__}\n")


@pytest.mark.slow
def test_a_closed_pipe_is_no_error():
    program = (
        "import sys, types\nfrom mtl_jax import cli\n"
        "module = types.ModuleType('mtl_jax.train')\n"
        "def main(args):\n    [print('line') for _ in range(100000)]\n"
        "module.main = main\nsys.modules['mtl_jax.train'] = module\n"
        "sys.exit(cli.main(['train']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 0
