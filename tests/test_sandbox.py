"""Templates from strangers: none runs code, none works without end, honest ones pass."""

import subprocess
import sys

import numpy as np
import pytest

from mtl_jax.errors import UserError
from mtl_jax.tasks.prompts import Template

ROW = {"text": "t" * 50, "items": [1, 2], "number": 3, "votes": ["no", "yes", "yes"]}


def render(jinja):
    return Template("t", f"{jinja} ||| x").render(dict(ROW), "row 1").inputs


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ text['__class__'] }}",
        "{{ text.__init__.__globals__ }}",
        "{{ (text | attr('__class__')).__base__ }}",
        "{{ [text] | selectattr('__class__') | list }}",
        "{{ '{0.__class__}'.format(text) }}",
        "{{ '{0.__class__}'.format_map({'0': text}) }}",
        "{{ self._TemplateReference__context.environment }}",
        "{% for x in items %}{{ loop._iterator }}{% endfor %}",
        "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ choice.__globals__ }}",
        "{{ range.__self__ }}",
        "{{ items.append.__self__ }}",
        "{{ lipsum.__globals__ }}",
        "{{ dict.fromkeys('ab') }}",
        "{{ text.encode() }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{{ open('/etc/passwd') }}",
    ],
)
def test_no_way_out(escape):
    with pytest.raises(UserError, match="Template 't'"):
        render(escape)


def test_what_a_row_holds_lends_no_methods(tmp_path):
    row = {"array": np.ones(3), "folder": tmp_path, "path": str(tmp_path / "written")}
    for jinja in ("{{ array.tofile(path) }}", "{{ folder.joinpath('written').touch() }}"):
        with pytest.raises(UserError, match="may not use"):
            Template("t", f"{jinja} ||| x").render(row)
    assert not list(tmp_path.iterdir())


LONG = "{% set n = namespace(x='aaaaaaaaaa', y=[1]) %}{% for i in range(60) %}"


@pytest.mark.parametrize(
    "endless",
    [
        "{{ range(10 ** 9) | list }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 10 ** 9 * 'a' }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 'a'.center(10 ** 9) }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%(a)01000000000d' | format(a=1) }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 1 | round(1000000000, 'ceil') }}",
        "{{ ('f' * 1000000) | int(base=16) }}",
        "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        LONG + "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        LONG + "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        LONG + "{% set n.x = [n.x, n.x] | join %}{% endfor %}{{ n.x }}",
        LONG + "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}{{ n.x }}",
        LONG + "{% set n.x = n.x.replace('a', n.x) %}{% endfor %}{{ n.x }}",
        LONG + "{% set n.x = n.x | replace('a', n.x) %}{% endfor %}{{ n.x }}",
        LONG + "{% set n.x = n.x.join(n.x) %}{% endfor %}{{ n.x }}",
        LONG + "{% set n.x = '%s%s' % (n.x, n.x) %}{% endfor %}{{ n.x }}",
        "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
        "{% for a in items %}" * 30 + "{% endfor %}" * 30,
    ],
)
def test_no_work_without_end(endless):
    with pytest.raises(UserError, match="Template 't'"):
        render(endless)


@pytest.mark.slow
@pytest.mark.parametrize(
    "endless",
    [
        "{% for x in items %}{% set _ = items.append(x) %}{% endfor %}",
        "{% set _ = items.append(items) %}{{ items }}",
        "{% set _ = items.append(items) %}{% for x in items recursive %}{{ loop(x) }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ range(100000) | select('in', [1] * 1000000) | list | length }}",
        "{% for a in range(100000) %}{{ range(100000) | map('string') | list }}{% endfor %}",
        LONG + "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.y }}",
        LONG + "{% set n.y = {'a': n.y, 'b': n.y} %}{% endfor %}{{ n.y }}",
        LONG + "{% set n.y = namespace(a=n.y, b=n.y) %}{% endfor %}{{ n.y }}",
    ],
)
def test_no_work_without_end_that_takes_seconds(endless):
    """In a process of little memory: a fence with a hole is an error, not a frozen machine."""
    program = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (100, 100))\n"
        "from mtl_jax.tasks.prompts import Template\n"
        "Template('t', sys.argv[1]).render({'items': [1, 2]})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, f"{endless} ||| x"], capture_output=True, text=True
    )
    assert "jinja asks for more work than one row may cost" in done.stderr


def test_each_rendering_has_an_allowance_of_its_own():
    half = "{{ ('a' * 30000000) | length }}"
    assert [render(half) for _ in range(3)] == ["30000000"] * 3
    with pytest.raises(UserError, match="more work than one row may cost"):
        render(half * 2)


@pytest.mark.parametrize(
    ("jinja", "text"),
    [
        ("{{ 2 ** 10 }} {{ 7 % 4 }} {{ 7 // 2 }} {{ 1 + 2 * 3 - 4 / 2 }}", "1024 3 3 5.0"),
        ("{{ 'a' * 3 ~ 'b' ~ 1 }} {{ ('a' ~ 'b') | upper }}", "aaab1 AB"),
        ("{{ '%.1f' | format(2.25) }} {{ '%s-%s' % (1, 'b') }} {{ 2.345 | round(1) }}",
         "2.2 1-b 2.3"),
        ("{{ 'a-b'.replace('-', '+') }} {{ 'aab' | replace('a', 'c', 1) }}", "a+b cab"),
        ("{{ ', '.join(votes) }} {{ votes | join('/') }}", "no, yes, yes no/yes/yes"),
        ("{{ [{'a': 1}, {'a': 2}] | join(',', attribute='a') }}", "1,2"),
        ("{{ [{'a': 1}, {'a': 2}] | sum(attribute='a') }} {{ items | sum }}", "3 3"),
        ("{% for x in votes %}{{ loop.index }}{{ x }}{{ loop.last }} {% endfor %}",
         "1noFalse 2yesFalse 3yesTrue"),
        ("{% for x in votes | map('upper') %}{{ loop.length }}{{ x }}{% endfor %}", "3NO3YES3YES"),
        ("{% for key, value in {'a': 1}.items() %}{{ key }}{{ value }}{% endfor %}", "a1"),
        ("{% for group in [{'k': 1}, {'k': 1}] | groupby('k') %}{{ group.list | length }}"
         "{% endfor %}", "2"),
        ("{% set n = namespace(i=0) %}{% for x in items %}{% set n.i = n.i + x %}{% endfor %}"
         "{{ n.i }}", "3"),
        ("{{ 2 in items }} {{ text[:2] }} {{ items[::-1] }} {{ '12' | int + 1 }}",
         "True tt [2, 1] 13"),
        ("{{ missing | default('none') }} {{ missing is defined }}", "none False"),
        ("{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m(1) }}{{ m('b') }}", "<1><b>"),
    ],
)  # fmt: skip
def test_the_payment_does_not_show(jinja, text):
    """Values computed by hand, as Jinja's documentation says."""
    assert render(jinja) == text


def test_long_rows_are_no_trouble():
    words = [f"w{n}" for n in range(2000)]
    tags = Template(
        "t",
        "{% set ns = namespace(found=[]) %}{% for w in words %}{% set _ = ns.found.append(w) %}"
        "{% endfor %}{{ ns.found | join(' ') }} ||| {{ text.split(' ') | length }}",
    ).render({"words": words, "text": "a b " * 200_000})
    assert tags.inputs == " ".join(words)
    assert tags.targets == "400001"
