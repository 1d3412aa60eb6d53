"""Task modules and the values of a mixture; mixtures themselves are tested in test_data.py."""

import pytest

from mtl_jax.data_config import DataConfig, MixtureConfig
from mtl_jax.errors import UserError
from mtl_jax.mixtures import load_modules


def test_modules_are_imported_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_registrations.py").write_text("import os\nSEEN = os.environ['MTL_JAX_DATA']\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTL_JAX_DATA", "before")
    monkeypatch.syspath_prepend(str(tmp_path))
    load_modules(DataConfig(task_modules=["my_registrations"], data_dir="."))
    import my_registrations

    assert str(tmp_path) == my_registrations.SEEN
    with pytest.raises(UserError, match=r"no Python module 'my_registration'.*my_registrations"):
        load_modules(DataConfig(task_modules=["my_registration"]))
    with pytest.raises(UserError, match=r"Data\.data_dir: nowhere is not a folder"):
        load_modules(DataConfig(data_dir="nowhere"))


def test_a_mixture_without_a_name_is_refused_before_anything_is_read():
    with pytest.raises(UserError, match=r"Mixture\.tasks is given but Mixture\.name is not"):
        MixtureConfig(tasks=["a"])
    assert MixtureConfig().tasks == ()
    assert MixtureConfig("new", ["a", "b"]).tasks == ("a", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ny = = 2\n", r"broken\.py, line 2: SyntaxError: invalid syntax"),
        ("x = 1\n\nx / 0\n", r"broken\.py, line 3: ZeroDivisionError: division by zero"),
        ("import json\njson.loads('{')\n", r"broken\.py, line 2: JSONDecodeError"),
        ("import helper_of_broken\n", r"helper_of_broken\.py, line 2: KeyError: 'b'"),
        ("import not_installed\n", r"broken\.py, line 1: ModuleNotFoundError: .*'not_installed'"),
    ],
)
def test_modules_that_fail_name_the_line(tmp_path, monkeypatch, text, message):
    (tmp_path / "broken.py").write_text(text)
    (tmp_path / "helper_of_broken.py").write_text("a = {}\na['b']\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"Data\.task_modules: the import of 'broken' .*" + message):
        load_modules(DataConfig(task_modules=["broken"]))
