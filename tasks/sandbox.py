"""Jinja for templates from strangers: no code runs, and no template works without end.

Three fences around Jinja's own sandbox, which alone stops neither `'a' * 10 ** 9` nor a million
nested loops, and lets a template call every public method of whatever a row holds:

* Only listed filters exist, and only listed methods of text, lists and dictionaries can be called.
* Arithmetic, joining, calls, loops and lists are paid for from an allowance, before they are done.
* The allowance is that of one rendering: half a million steps or a hundred million characters.

The allowance is counted, not timed, so a template that passes once passes everywhere. A refusal
comes as `jinja2.exceptions.SecurityError`.
"""

import contextlib
import contextvars
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import filters, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_ALLOWANCE = 100_000_000  # characters; other things are priced in them
_STEP, _CALL, _ITEM = 200, 500, 50
_MOST_BITS = 4096  # of a whole number; arithmetic on longer ones can take hours


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FILTERS = _names(
    "abs capitalize count d default dictsort first float groupby items last length list lower map "
    "max min reject rejectattr reverse select selectattr sort string striptags title trim truncate "
    "unique upper wordcount"
)
_METHODS = {
    str: _names(
        "capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit islower "
        "isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix "
        "replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase "
        "title upper"
    ),
    list: _names("append clear copy count extend index insert pop remove reverse sort"),
    tuple: _names("count index"),
    dict: _names("clear copy get items keys pop setdefault update values"),
}
_AT_ONCE = _names("append get items keys pop values")  # take no longer where there is more
# What a template may look into beside these: Jinja's own objects, whose attributes it guards.
_JINJA_OBJECTS = (
    jinja2.runtime.LoopContext,
    jinja2.runtime.Macro,
    jinja2.runtime.TemplateReference,
    jinja2.runtime.Undefined,
    Namespace,
)
_CHARGED, _JOINED = "mtl_jax_charged", "mtl_jax_joined"
_LONG_FIELD = re.compile(r"%(?:\(.*|[^a-zA-Z%]*)(?:\*|\d{4})", re.DOTALL)


class TooMuchWork(SecurityError):
    """One rendering asks for more than its allowance."""


class _Rendering:
    """What belongs to one rendering: what is left of its allowance, and its random choices."""

    def __init__(self, chooser: Any = None):
        self.left = _ALLOWANCE
        self.chooser = chooser


_RENDERING: contextvars.ContextVar[_Rendering] = contextvars.ContextVar("rendering")


@contextlib.contextmanager
def allowance(chooser: Any = None) -> Iterator[None]:
    """One rendering (or compilation: Jinja computes constants then) with an allowance of its own.

    Args:
        chooser: its `choice(items)` serves the filters `choice` and `random`.
    """
    token = _RENDERING.set(_Rendering(chooser))
    try:
        yield
    finally:
        _RENDERING.reset(token)


def _spend(units: int) -> None:
    rendering = _RENDERING.get()
    rendering.left -= units
    if rendering.left < 0:
        raise TooMuchWork("more work than one row may cost: endless loops, or text without end")


def _spend_on(value: Any) -> int:
    """Pays for looking at all of a value and returns the price.

    A list that holds itself is never paid off, so it is refused.
    """
    before = _RENDERING.get().left
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            _spend(len(item))
        elif isinstance(item, Namespace):
            waiting.append(item._Namespace__attrs)
        elif isinstance(item, Collection) and not isinstance(item, jinja2.runtime.Undefined):
            _spend(_ITEM * len(item))
            if not isinstance(item, range):
                waiting.extend(item)
            if isinstance(item, Mapping):
                waiting.extend(item.values())
    return before - _RENDERING.get().left


def _charged(value: Any, price: int = 0) -> Any:
    """Pays for reading a value once, `price` more for each of its items; returns the value."""
    if isinstance(value, Iterator):
        return _counted(value, price + _ITEM)
    _spend_on(value)
    if price and isinstance(value, Collection) and not isinstance(value, jinja2.runtime.Undefined):
        _spend(price * len(value))
    return value


def _counted(items: Iterator[Any], price: int) -> Iterator[Any]:
    for item in items:
        _spend(price)
        yield item


def _joined(parts: Iterable[Any], separator: Any = "") -> str:
    texts = []
    for part in parts:
        _spend_on(part)
        texts.append(str(part))
    _spend(len(str(separator)) * len(texts))
    return str(separator).join(texts)


def _join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    # As Jinja's filter of this name, whose parameters it has, but for escaping, which is off.
    if attribute is not None:
        value = map(filters.make_attrgetter(ENVIRONMENT, attribute), value)
    return _joined(value, d)


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _spend(text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > 300:
        raise TooMuchWork(f"rounding to {precision} digits")
    return filters.do_round(value, precision, method)


def _int(value: Any, default: Any = 0, base: int = 10) -> Any:
    return _short(filters.do_int(value, default, base))


def _short(number: Any) -> Any:
    if isinstance(number, int) and number.bit_length() > _MOST_BITS:
        raise TooMuchWork(f"a number of more than {_MOST_BITS} bits")
    return number


def _formatted(text: Any, values: Any) -> str:
    if _LONG_FIELD.search(str(text)):
        raise TooMuchWork("a '%' format with a width of 1000 and more, or one by '*'")
    _spend((_spend_on(values) + 1000) * str(text).count("%"))
    return str(text) % values


def _format(text: Any, *values: Any, **named: Any) -> str:
    return _formatted(text, named or values)


def _sum(values: Iterable[float], attribute: str | int | None = None) -> float:
    if attribute is not None:
        values = map(filters.make_attrgetter(ENVIRONMENT, attribute), values)
    return sum(values)


def _range(*bounds: int) -> range:
    found = range(*bounds)
    _spend(_ITEM * len(found))
    return found


def _choice(items: Iterable[Any]) -> Any:
    return _RENDERING.get().chooser.choice(list(items))


def _most_frequent(items: Sequence[Any]) -> list[Any] | None:
    """All items that occur most often, in the order of their first occurrence."""
    if not items:
        return None
    counts = Counter(items).most_common()
    return [item for item, count in counts if count == counts[0][1]]


class _Charges(NodeTransformer):
    """Writes the payment into the syntax: what filters, loops and comparisons read, what is made.

    Constants are free: they are no longer than the template.
    """

    def _charge(self, node: Any, *more: int) -> Any:
        if isinstance(node, nodes.Const | nodes.TemplateData):
            return node
        return _filter(node, _CHARGED, *more)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._charge(node.iter, _STEP)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        if node.node is not None:
            node.node = self._charge(node.node)
        return node

    def visit_Operand(self, node: nodes.Operand) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._charge(node.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = self._charge(node.node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _JOINED)

    def _visit_made(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"  # {% for a, b in ... %}
        return node if stored or _is_constant(node) else self._charge(node)

    visit_List = visit_Tuple = visit_Dict = _visit_made


def _filter(node: nodes.Expr, name: str, *arguments: int) -> nodes.Filter:
    constants = [nodes.Const(argument, lineno=node.lineno) for argument in arguments]
    return nodes.Filter(node, name, constants, [], None, None, lineno=node.lineno)


def _is_constant(node: nodes.Node) -> bool:
    if isinstance(node, nodes.List | nodes.Tuple | nodes.Dict | nodes.Pair):
        return all(map(_is_constant, node.iter_child_nodes()))
    return isinstance(node, nodes.Const)


class _Undefined(jinja2.StrictUndefined):
    """An error also where a list that holds it is written out, which asks for its `repr`."""

    __slots__ = ()
    __repr__ = jinja2.StrictUndefined.__str__


class _Environment(SandboxedEnvironment):
    intercepted_binops = frozenset(SandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(undefined=_Undefined, cache_size=0, finalize=_output)
        own: dict[str, Any] = {"join": _join, "replace": _replace, "format": _format}
        own |= {"int": _int, "round": _round, "sum": _sum}
        own |= {"choice": _choice, "random": _choice, "zip": zip, "most_frequent": _most_frequent}
        own |= {"highlight": str, _CHARGED: _charged, _JOINED: _joined}
        self.filters = {name: filters.FILTERS[name] for name in _FILTERS} | own
        self.tests["in"] = lambda value, items: value in _charged(items)
        self.globals = {"range": _range, "dict": dict, "namespace": Namespace}
        self.globals |= {"zip": zip, "choice": _choice, "most_frequent": _most_frequent}

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        texts = list(parts)
        _spend(sum(map(len, texts)))
        return "".join(texts)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _Charges().visit(tree).set_environment(self)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, _JINJA_OBJECTS):
            return super().is_safe_attribute(obj, attr, value)
        if isinstance(obj, tuple) and attr in getattr(obj, "_fields", ()):  # of `groupby`
            return True
        return any(isinstance(obj, kind) and attr in names for kind, names in _METHODS.items())

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is not among the methods."""

    def call(
        __self,  # a template may name an argument `self`
        __context: jinja2.runtime.Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Pays for the call, what it is given and what it works on, then calls."""
        _spend(_CALL)
        _spend_on(args)
        _spend_on([value for name, value in kwargs.items() if not name.startswith("_")])
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | list | tuple | dict) and __obj.__name__ not in _AT_ONCE:
            _spend_on(owner)
        if isinstance(owner, str) and __obj.__name__ == "join" and len(args) == 1:
            args = (list(_charged(args[0])),)
            _spend(len(owner) * len(args[0]))
        elif isinstance(owner, str) and __obj.__name__ == "replace" and len(args) >= 2:
            _spend(owner.count(args[0]) * len(args[1]))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Pays for an operation of arithmetic, also on texts and lists, then does it."""
        _spend(_STEP)
        if operator == "%" and isinstance(left, str):
            return _formatted(left, right)
        _short(left)
        _short(right)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > _MOST_BITS:
                raise TooMuchWork(f"a number of more than {_MOST_BITS} bits")
        elif operator == "*":
            _spend_on_copies(left, right)
            _spend_on_copies(right, left)
        elif operator == "+":
            _spend_on((left, right))
        return super().call_binop(context, operator, left, right)


def _spend_on_copies(value: Any, copies: Any) -> None:
    if isinstance(value, str | list | tuple) and isinstance(copies, int) and copies > 0:
        _spend(_spend_on(value) * (copies - 1))


def _output(value: Any) -> Any:
    """What `{{ }}` prints, before it is made into text."""
    if not isinstance(value, str):
        _spend_on(value)
    return value


ENVIRONMENT = _Environment()
