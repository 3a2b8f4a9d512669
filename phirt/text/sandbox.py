"""Where untrusted templates run: jinja2's immutable sandbox, in which everything pays.

The only module that imports jinja2. Three things are added to its sandbox, all through
its documented interfaces:

- Before a template is compiled, payments are put into its syntax tree for what the sandbox does
  not intercept: loop iterations, macro bodies, comparisons, slices, ``~`` and output.
  Constants are not folded, so that nothing runs while compiling.
- Operators, calls, filters and tests pay before they run (`phirt.text.operations`).
- Only listed methods, functions and filters can be called, and attributes that lead into the
  interpreter raise at once instead of reading as undefined (`phirt.text.guard`).
"""

from __future__ import annotations

from functools import lru_cache
from types import BuiltinMethodType, MethodType
from typing import Any, cast

import jinja2
import jinja2.parser
from jinja2 import Undefined, nodes, sandbox
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.utils import Cycler, Joiner, Namespace

from phirt.errors import ModelFormatError, UnsafeModelError
from phirt.text import functions, guard
from phirt.text.budget import MAX_CALL_DEPTH, MAX_ITEMS, NODE, Meter, exceeded
from phirt.text.operations import FILTERS

__all__ = ["TemplateProgram"]

_MAX_SOURCE = 128 * 1024  # characters; the longest of published models have about 30,000
_MAX_NODES = 12_000
_MAX_DEPTH = 100
# jinja2's compiler copies the table of names for each branch and scope.
_MAX_NAMES_TIMES_SCOPES = 500_000

# Names of the filters that are put into a syntax tree. No template can write them: they hold
# a space; and none can name them at run time: see `guard.check_filter_name`.
_PAYMENTS = {
    "phirt pay": guard.pay,
    "phirt iterate": guard.iterate,
    "phirt operand": guard.operand,
    "phirt text": guard.text,
}


class TemplateProgram:
    """A compiled template. Safe to use from many threads at once.

    Args:
        source: The template, in jinja2's language.

    Raises:
        ModelFormatError: The template is not valid.
        UnsafeModelError: It reaches for what templates must not, or is too large.
    """

    def __init__(self, source: str) -> None:
        self._template = _compile(source)

    def render(self, context: dict[str, Any]) -> str:
        """The text for these variables, which hold plain data only.

        Raises:
            ValueError: The template refuses its variables, with its own words.
            UnsafeModelError: It exceeds a budget or is refused an operation.
            ModelFormatError: It fails otherwise.
        """
        try:
            return _render(self._template, context)
        except (UnsafeModelError, ModelFormatError):
            raise
        except functions.RefusedError as error:
            raise ValueError(
                f"The model's chat template refuses these messages: {error}"
            ) from error
        except SecurityError as error:
            raise UnsafeModelError(f"The model's chat template is unsafe: {error}") from error
        except RecursionError as error:
            raise exceeded("recursion", f"{MAX_CALL_DEPTH} calls") from error
        except Exception as error:  # whatever Python's operators and methods raise
            raise ModelFormatError(
                f"The model's chat template fails on these messages: {error}. Check them against "
                "the template, or pass rendered text as the prompt."
            ) from error


def _render(template: jinja2.Template, context: dict[str, Any]) -> str:
    """Render within a budget that grows with the size of the context."""
    meter = Meter(context)
    token = guard.METER.set(meter)
    try:
        length = 0
        pieces = []
        for piece in template.generate(context):
            length += len(piece)
            meter.check_output(length)
            pieces.append(piece)
        return "".join(pieces)
    finally:
        guard.METER.reset(token)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """A template; of a source that was compiled before, the same one."""
    if len(source) > _MAX_SOURCE:
        raise exceeded("source size", f"{_MAX_SOURCE:,} characters")
    environment = _environment()
    try:
        tree = environment.parse(source)
        _add_payments(_checked_nodes(tree))
        code = environment.compile(tree)
    except RecursionError as error:
        raise exceeded("nesting", f"{_MAX_DEPTH} levels") from error
    except (jinja2.TemplateError, SyntaxError, ValueError) as error:
        # SyntaxError: Python's compiler refuses what jinja2 let through, such as 21 nested
        # loops. ValueError: a number of more digits than Python reads.
        raise ModelFormatError(f"The model's chat template is not valid: {error}") from error
    return jinja2.Template.from_code(environment, code, environment.make_globals(None))


def _checked_nodes(tree: nodes.Template) -> list[nodes.Node]:
    """All nodes of a syntax tree, after bounding what compiling it costs.

    Raises:
        UnsafeModelError: Too many nodes, too deep, or a node that templates may not use.
    """
    refused = (
        *(nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport),
        nodes.EvalContextModifier,
    )
    found: list[nodes.Node] = []
    level: list[nodes.Node] = [tree]
    for _ in range(_MAX_DEPTH):
        found += level
        if len(found) > _MAX_NODES:
            raise exceeded("template nodes", f"{_MAX_NODES:,}")
        for node in level:
            if isinstance(node, refused):
                raise UnsafeModelError(
                    f"The model's chat template uses {type(node).__name__!r} on line "
                    f"{node.lineno}: templates may not load others or change their evaluation."
                )
            if isinstance(node, nodes.Getattr) and node.attr.startswith("__"):
                raise guard.unsafe_attribute(node.attr)
        level = [child for node in level for child in node.iter_child_nodes()]
        if not level:
            break
    else:
        raise exceeded("nesting", f"{_MAX_DEPTH} levels")
    names = {node.name for node in found if isinstance(node, nodes.Name)}
    scopes = sum(isinstance(node, nodes.Stmt | nodes.CondExpr) for node in found)
    if len(names) * scopes > _MAX_NAMES_TIMES_SCOPES:
        raise exceeded("names times statements", f"{_MAX_NAMES_TIMES_SCOPES:,}")
    return found


def _add_payments(found: list[nodes.Node]) -> None:
    """Make a template pay for what jinja2's sandbox does not intercept, in place."""
    # Before anything is put in: what a body costs is what its author wrote.
    bodies = [node for node in found if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)]
    for body, payment in [(body, _payment(body)) for body in bodies]:
        body.body.insert(0, nodes.ExprStmt(payment, lineno=body.lineno))
        if isinstance(body, nodes.For) and body.test is not None:
            body.test = nodes.And(payment, cast("nodes.Expr", body.test), lineno=body.lineno)
    for node in found:
        if isinstance(node, nodes.For):
            node.iter = _paid(node.iter, "phirt iterate")
        elif isinstance(node, nodes.Output | nodes.Concat):
            node.nodes = [_paid(child, "phirt text") for child in node.nodes]
        elif isinstance(node, nodes.Compare | nodes.Operand):
            node.expr = _paid(node.expr, "phirt operand")
        elif isinstance(node, nodes.Pair):  # hashing visits all parts, as comparing does
            node.key = _paid(node.key, "phirt operand")
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            node.node = _paid(node.node, "phirt iterate")


def _paid(node: nodes.Node, name: str) -> nodes.Expr:
    """``node|name``, but for constants, which `_payment` counts."""
    if isinstance(node, nodes.Const | nodes.TemplateData):
        return node
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _payment(body: nodes.Node) -> nodes.Expr:
    """An expression that pays for running all of ``body`` once, and is true."""
    units = 0
    level = [body]
    while level:
        units += NODE * len(level)
        for node in level:
            if isinstance(node, nodes.TemplateData):
                units += len(node.data)
            elif isinstance(node, nodes.Const) and isinstance(node.value, str):
                units += len(node.value)
        level = [child for node in level for child in node.iter_child_nodes()]
    amount = nodes.Const(units, lineno=body.lineno)
    return nodes.Filter(amount, "phirt pay", [], [], None, None, lineno=body.lineno)


class _Formatter(guard.PaidFormatter, sandbox.SandboxedFormatter):
    """For ``str.format``."""


class _EscapeFormatter(guard.PaidFormatter, sandbox.SandboxedEscapeFormatter):
    """For text that the filter ``safe`` has marked."""


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """jinja2's hooks, connected to `phirt.text.guard`."""

    intercepted_binops = frozenset(sandbox.SandboxedEnvironment.default_binop_table)

    def __init__(self, calls: guard.CallGuard, **options: Any) -> None:
        super().__init__(**options)
        self._calls = calls

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        # jinja2 returns an undefined value, which prints as nothing: an attack that fails
        # silently can go on trying. What changes a list stays undefined, as in jinja2.
        if attribute.startswith("_") or sandbox.is_internal_attribute(obj, attribute):
            raise guard.unsafe_attribute(attribute)
        return super().unsafe_undefined(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        guard.check_key(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> guard.Function | None:
        is_method = isinstance(value, BuiltinMethodType | MethodType)
        if not is_method or value.__name__ not in {"format", "format_map"}:
            return None
        template = value.__self__
        if not isinstance(template, str):
            return None
        escape = getattr(template, "escape", None)  # of markupsafe's Markup
        formatter = _EscapeFormatter(self, escape=escape) if escape else _Formatter(self)
        return guard.Format(template, formatter, is_map=value.__name__ == "format_map")

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        guard.check_filter_name(name)
        return super().call_filter(name, *args, **kwargs)

    def call_binop(self, _context: Any, operator: str, left: Any, right: Any) -> Any:
        return guard.apply_operator(self.binop_table[operator], operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        def proceed(*args: Any, **kwargs: Any) -> Any:
            return super(_Sandbox, self).call(context, obj, *args, **kwargs)

        return self._calls.call(proceed, obj, args, kwargs)


class _Namespace(Namespace):
    """``namespace(...)``, without names that start with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a key may be called "self"
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            guard.check_stored_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        guard.check_stored_name(name)
        super().__setitem__(name, value)

    def budget_contents(self) -> dict[str, Any]:
        """For `Meter.weigh`: attribute access reaches what the template stored, only."""
        return cast("dict[str, Any]", object.__getattribute__(self, "_Namespace__attrs"))


class _Generation(Extension):
    """``{% generation %}``, which marks what the assistant says; it changes no output."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


@lru_cache(maxsize=1)
def _environment() -> sandbox.SandboxedEnvironment:
    """The environment of `transformers`' chat templates, in which everything pays."""
    available = {
        "range": _range,
        "dict": functions.TemplateDict(),
        "namespace": _Namespace,
        "cycler": Cycler,
        "joiner": Joiner,
        "raise_exception": functions.raise_exception,
        "strftime_now": functions.strftime_now,
    }
    environment: sandbox.SandboxedEnvironment = _Sandbox(
        _call_guard(available),
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
        optimized=False,  # constants are not folded: operators would run unpaid
    )
    environment.globals |= available
    environment.filters["tojson"] = functions.to_json
    passed = (Context, nodes.EvalContext, jinja2.Environment)
    environment.filters = {
        **{name: guard.paid_filter(name, environment.filters[name], passed) for name in FILTERS},
        **{name: jinja2.pass_context(function) for name, function in _PAYMENTS.items()},
    }
    environment.tests = {
        name: guard.paid_test(cast("guard.Function", test), passed)
        for name, test in environment.tests.items()
    }
    return environment


def _call_guard(available: dict[str, Any]) -> guard.CallGuard:

    return guard.CallGuard(
        available,
        # Calling an undefined value raises jinja2's own error.
        callables=(guard.Format, Joiner, jinja2.Undefined),
        owners=(LoopContext, Cycler, functions.TemplateDict),
        bodies=(LoopContext, Macro),
    )


def _range(*args: int) -> range:

    try:
        return sandbox.safe_range(*args)
    except OverflowError as error:
        raise exceeded("list size", f"{MAX_ITEMS:,} elements") from error
