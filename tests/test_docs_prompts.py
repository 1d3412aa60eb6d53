"""docs/prompts.md is run as it stands."""

import re

import pytest
from test_docs import DOCS, play

from mtl_jax.tasks import prompt_files
from mtl_jax.tasks.prompts import Template

PAGE = DOCS / "prompts.md"


@pytest.mark.slow
def test_prompts(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    # `play` writes the files whose names its pattern knows; this one is YAML.
    yaml = re.search(r"`claims\.yaml`:\n\n```yaml\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "claims.yaml").write_text(yaml, encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(text.replace(f"```yaml\n{yaml}```\n", ""), encoding="utf-8")
    output = play(page, tmp_path)
    for line in (
        'inputs   The shop opens at nine. Does it follow that "It is open at ten."?',
        "choices  true ||| false",
        "rows     4, of which 1 skipped",  # the hidden label
        "rows     4, of which 2 skipped",  # claims that are not true
        "claims_does_it_follow",
        "targets  My train was late.",
    ):
        assert f"  {line}\n" in output or f"\n{line} " in output, line
    assert output.count("rows     4, of which 1 skipped") == 3
    assert "warning" not in output


def test_the_table_of_fields_is_complete():
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", text[text.index("| field |") : text.index("**Choices.**")]))
    fields = {*prompt_files.FIELDS, *prompt_files.METADATA} - {"dataset", "subset"}
    assert named >= fields | {"metadata"}
    assert fields == set(Template.__dataclass_fields__)
