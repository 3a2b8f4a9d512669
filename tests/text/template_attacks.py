"""Chat templates that attack, and a program that renders them one after another.

Run as a program it prints one JSON object a line: the attack's name, the seconds that it
took, the class and text of the error (or null and the output), and the process's peak memory.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

import psutil

__all__ = ["ATTACKS", "ESCAPES"]


def _grow(start: str, step: str, end: str = "", *, times: int = 60) -> str:
    loop = f"{{% for i in range({times}) %}}{step}{{% endfor %}}"
    return f"{{% set ns = namespace(x={start}) %}}{loop}{end}"


def _repeat(setup: str, body: str) -> str:
    return f"{setup}{{% for i in range(99999) %}}{{% set y = {body} %}}{{% endfor %}}"


# Name: template and the words of the error. A budget's name, or what is refused.
ATTACKS = {
    # loops and recursion
    "nested loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "budget of work",
    ),
    "loops with output": (
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxx{% endfor %}{% endfor %}",
        "budget of work",
    ),
    "loops with long literal output": (
        "{% for a in range(99999) %}" + "x" * 99_999 + "{% endfor %}",
        "budget of output",
    ),
    "captured long literal output": (
        "{% set y %}{% for a in range(99999) %}" + "x" * 99_999 + "{% endfor %}{% endset %}",
        "budget of work",
    ),
    "a loop that filters everything away": (
        _repeat("{% set r = range(99999) %}", "1").replace(
            "{% set y = 1 %}", "{% for b in r if false %}{% endfor %}"
        ),
        "budget of work",
    ),
    "a recursive loop": (
        "{% set x = [1, 2] %}{% for a in x recursive %}{{ loop(x) }}{% endfor %}",
        "budget of recursion",
    ),
    "a recursive loop that branches": (
        "{% for a in range(99) recursive %}{{ loop(range(99)) if loop.depth < 9 }}{% endfor %}",
        "budget of work",
    ),
    "a macro that calls itself": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "budget of recursion",
    ),
    "a macro that branches": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "budget of work",
    ),
    "a call block": (
        "{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}"
        + _repeat("", "1").replace("{% set y = 1 %}", "{% for b in range(999) %}a{% endfor %}")
        + "{% endcall %}",
        "budget of work",
    ),
    "macro arguments": (
        "{% macro f() %}{{ varargs | length }}{% endmacro %}"
        + _repeat("{% set r = range(99999) %}", "f(*r)"),
        "budget of work",
    ),
    "a list literal in a loop": (_repeat("", "[" + "1," * 5000 + "]"), "budget of work"),
    "a range of a billion": ("{{ range(10**9) | list }}", "budget of list size"),
    "a chain of iterators": (
        _grow("[1]", "{% set ns.x = ns.x | select %}", "{{ ns.x | list }}", times=20_000),
        "budget of work",
    ),
    "unpaid elements of iterators": (
        _repeat("{% set s = [0] * 99999 %}", "s | select | first"),
        "budget of work",
    ),
    # sized operators
    "string multiplication": ("{{ 'a' * 10**10 }}", "budget of text size"),
    "string multiplication that is not printed": (
        "{% if 'a' * 10**10 %}{% endif %}",
        "budget of text size",
    ),
    "work given back by a negative size": (
        _repeat("", "'a' * -10**9"),
        "budget of work",
    ),
    "list multiplication": ("{{ [1] * 10**9 }}", "budget of list size"),
    "a list of long lists": ("{{ [[1] * 99999] * 99999 }}", "budget of work"),
    "printf width": ("{{ '%0300000000d' % 1 }}", "budget of text size"),
    "printf precision": ("{{ '%.300000000f' % 1 }}", "budget of text size"),
    "printf width behind a nested key": (
        "{{ '%((a))0300000000d' % {'(a)': 1} }}",
        "budget of text size",
    ),
    "printf width from an argument": ("{{ '%*d' % (10**9, 1) }}", "from its arguments"),
    "printf of one value many times": (
        "{{ ('%(a)s' * 20000) % {'a': 'x' * 100000} }}",
        "budget of text size",
    ),
    "printf filter": ("{{ '%0300000000d' | format(1) }}", "budget of text size"),
    "format width": ("{{ '{:>1000000000}'.format(1) }}", "budget of text size"),
    "format width in other digits": (
        "{{ '{:>\u0661\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660}'.format(1) }}",
        "budget of text size",
    ),
    "format width from an argument": (
        "{{ '{:{w}}'.format(1, w='>1000000000') }}",
        "budget of text size",
    ),
    "format precision": ("{{ '{:.999999999f}'.format(1.5) }}", "budget of text size"),
    "format_map of one value many times": (
        "{{ ('{a}' * 20000).format_map({'a': 'x' * 100000}) }}",
        "budget of work",
    ),
    "center filter": ("{{ 'a' | center(10**10) }}", "budget of text size"),
    "center filter of a constant": ("{{ 'a' | center(10000000000) }}", "budget of text size"),
    "center method": ("{{ 'a'.center(10**10) }}", "budget of text size"),
    "ljust": ("{{ 'a'.ljust(10**10) }}", "budget of text size"),
    "rjust": ("{{ 'a'.rjust(10**10) }}", "budget of text size"),
    "zfill": ("{{ '1'.zfill(10**10) }}", "budget of text size"),
    "expandtabs": ("{{ '\\t'.expandtabs(10**10) }}", "method 'expandtabs'"),
    "indent": ("{{ ('\\n' * 100000) | indent(100000) }}", "budget of text size"),
    "indent at other line ends": (
        "{{ ('\\u2028a' * 100000) | indent(100000) }}",
        "budget of text size",
    ),
    "indent block": (
        "{% filter indent(10**9) %}a\nb{% endfilter %}",
        "budget of text size",
    ),
    "join filter": ("{{ range(99999) | join('a' * 99999) }}", "budget of text size"),
    "join filter of an iterator": (
        "{{ range(999) | map('string') | join('a' * 99999) }}",
        "budget of text size",
    ),
    "join method": ("{{ ('a' * 99999).join(['b'] * 99999) }}", "budget of text size"),
    "replace filter": (
        _grow("'a'", "{% set ns.x = ns.x | replace('a', 'aa') %}"),
        "budget of text size",
    ),
    "replace method": ("{{ ('a' * 99999).replace('', 'b' * 99999) }}", "budget of text size"),
    "doubling concatenation": (_grow("'a'", "{% set ns.x = ns.x ~ ns.x %}"), "budget of work"),
    "doubling addition": (_grow("'a'", "{% set ns.x = ns.x + ns.x %}"), "budget of text size"),
    "doubling capture": (
        _grow("'a'", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
        "budget of work",
    ),
    "escaping again and again": ("{{ ('<' * 900000) | e | string | e }}", "budget of text size"),
    "batch": ("{{ ['a'] | batch(10**9, 'x') | list }}", "budget of list size"),
    "slice": ("{{ ['a'] | slice(10**9) | list }}", "budget of list size"),
    "sum of lists": ("{{ ([[1] * 999] * 9999) | sum(start=[]) }}", "filter 'sum'"),
    "JSON indentation": ("{{ [1, 2] | tojson(indent=10**9) }}", "budget of text size"),
    "JSON separators": (
        "{{ (range(50000) | list) | tojson(separators=('a' * 99999, ':')) }}",
        "budget of text size",
    ),
    "strftime": ("{{ strftime_now('%0999999999d' * 999) }}", "budget of strftime format"),
    # integers
    "a tower of powers": ("{{ 10 ** (10 ** 10) }}", "budget of integer size"),
    "repeated squaring": (_grow("2", "{% set ns.x = ns.x * ns.x %}"), "budget of integer size"),
    "a huge parsed integer": ("{{ ('9' * 4000) | int * 3 }}", "budget of integer size"),
    "a huge hexadecimal integer": (
        "{{ ('f' * 900000) | int(0, 16) }}",
        "budget of integer size",
    ),
    "rounding to a million digits": ("{{ 1 | round(10**6) }}", "budget of integer size"),
    # containers that share their parts
    "printing shared lists": (
        _grow("[1]", "{% set ns.x = [ns.x, ns.x] %}", "{{ ns.x }}"),
        "budget of work",
    ),
    "comparing shared lists": (
        _grow("[1]", "{% set ns.x = [ns.x, ns.x] %}", "{{ ns.x == ns.x[:] }}"),
        "budget of work",
    ),
    "hashing shared tuples": (
        _grow("(1,)", "{% set ns.x = (ns.x, ns.x) %}", "{{ {ns.x: 1} }}"),
        "budget of work",
    ),
    "subscribing with shared tuples": (
        _grow("(1,)", "{% set ns.x = (ns.x, ns.x) %}", "{{ {}[ns.x] }}"),
        "budget of work",
    ),
    "shared lists as JSON": (
        _grow("[1]", "{% set ns.x = [ns.x, ns.x] %}", "{{ ns.x | tojson }}"),
        "budget of work",
    ),
    "shared namespaces": (
        _grow("1", "{% set ns.x = namespace(a=ns.x, b=ns.x) %}", "{{ ns.x }}"),
        "budget of (work|nesting)",
    ),
    "a namespace that holds itself": (
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
        "budget of nesting",
    ),
    "deep lists as JSON": (
        _grow("1", "{% set ns.x = [ns.x] %}", "{{ ns.x | tojson }}", times=9999),
        "budget of (work|nesting)",
    ),
    "a growing dictionary": (
        _grow("{}", "{% set ns.x = dict(ns.x, **{i | string: i}) %}", times=99_999),
        "budget of work",
    ),
    "a growing list": (
        _grow("[]", "{% set ns.x = ns.x + [i] %}", times=99_999),
        "budget of work",
    ),
    # long texts, again and again
    "slices": (_repeat("{% set s = 'a' * 900000 %}", "s[1:]"), "budget of work"),
    "splits": (_repeat("{% set s = 'a,' * 400000 %}", "s.split(',')"), "budget of work"),
    "searches": (_repeat("{% set s = 'a' * 900000 %}", "s.find('b')"), "budget of work"),
    "a search backwards": (
        "{{ ('a' * 900000).rfind('b' + 'a' * 450000) }}",
        "budget of work",
    ),
    "comparisons": (_repeat("{% set s = 'a' * 900000 %}", "s == s ~ ''"), "budget of work"),
    "words": (_repeat("{% set s = 'a ' * 400000 %}", "s | wordcount"), "budget of work"),
    "titles": (_repeat("{% set s = 'a ' * 400000 %}", "s | title"), "budget of work"),
    "sorting": (_repeat("{% set s = range(9999) | list %}", "s | sort"), "budget of work"),
    "sorting by many attributes": (
        "{{ ([{'a': 1}] * 999) | sort(attribute='a,' * 9999) }}",
        "budget of work",
    ),
    "a long attribute path": (
        "{{ ([{'a': 1}] * 999) | map(attribute='a.' * 9999) | list }}",
        "budget of work",
    ),
    "tests": (_repeat("{% set s = 'A' * 900000 %}", "s is upper"), "budget of work"),
    # while compiling
    "a long source": ("x" * 10**7, "budget of source size"),
    "deep parentheses": ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "budget of nesting"),
    "a deep list": ("{{ " + "[" * 20_000, "budget of nesting"),
    "many signs": ("{{ " + "-" * 20_000 + "1 }}", "budget of nesting"),
    "many negations": ("{{ " + "not " * 20_000 + "1 }}", "budget of nesting"),
    "a long sum": ("{{ " + "1+" * 20_000 + "1 }}", "budget of (nesting|template nodes)"),
    "many filters": ("{{ 'a'" + "|upper" * 9000 + " }}", "budget of (nesting|template nodes)"),
    "deep conditions": (
        "{% if a %}" * 5000 + "{% endif %}" * 5000,
        "budget of (nesting|template nodes)",
    ),
    "many expressions": ("{{a}}" * 20_000, "budget of template nodes"),
    "many names and branches": (
        "".join(f"{{%set a{i}=1%}}" for i in range(2000)) + "{%if a%}{%endif%}" * 2000,
        "budget of names times statements",
    ),
    "a constant condition of autoescape": (
        "{% autoescape 'a' * 10**10 %}{% endautoescape %}",
        "templates may not",
    ),
}

# What must never be reached. Name: template.
ESCAPES = {
    "globals of lipsum": "{{ lipsum.__globals__ }}",
    "globals of lipsum, subscribed": "{{ lipsum['__globals__']['os'].system('true') }}",
    "globals of a test that reads as undefined": "{{ lipsum.__globals__ is defined }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "globals of our own function": "{{ raise_exception.__globals__ }}",
    "class of a string": "{{ ''.__class__ }}",
    "class through subscription": "{{ ''['__class__'] }}",
    "class through a computed name": "{{ ''['__cla' ~ 'ss__'] }}",
    "class through attr": "{{ '' | attr('__class__') }}",
    "class through a computed attr": "{{ '' | attr('__cla' ~ 'ss__') }}",
    "class through map": "{{ [''] | map(attribute='__class__') | list }}",
    "class through map and attr": "{{ [''] | map('attr', '__class__') | list }}",
    "class through selectattr": "{{ [''] | selectattr('__class__') | list }}",
    "class through sort": "{{ ['', 'a'] | sort(attribute='__class__') }}",
    "class through groupby": "{{ [''] | groupby('__class__') }}",
    "class through sum": "{{ [''] | sum(attribute='__class__') }}",
    "class through unique": "{{ [''] | unique(attribute='__class__') | list }}",
    "class through min": "{{ ['', 'a'] | min(attribute='__class__') }}",
    "class through format": "{{ '{0.__class__}'.format('') }}",
    "class through format with an index": "{{ '{0[__class__]}'.format('') }}",
    "class through format_map": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "class through a stored format": "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "class through attr of format": "{{ ('{0.__class__}' | attr('format'))('') }}",
    "class through map of format": "{{ ['{0.__class__}'] | map(attribute='format') | first }}"
    "{{ (['{0.__class__}'] | map(attribute='format') | first)('') }}",
    "class through marked text's format": "{{ ('{0.__class__}' | safe).format('') }}",
    "class of a number through format's width": "{{ '{:{w.__class__}}'.format(1, w='') }}",
    "mro of a class": "{{ cycler.mro() }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a method of a list that changes it": "{{ messages.append(1) }}",
    "a method of a message that changes it": "{{ messages[0].update({'role': 'x'}) }}",
    "a private name in a namespace": "{{ namespace(__class__=1) }}",
    "a private attribute of a namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "attributes of a namespace": "{{ namespace(a=1)._Namespace__attrs }}",
    "environment of a macro": "{% macro f() %}{% endmacro %}{{ f._environment }}",
    "function of a macro": "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
    "context of the template": "{{ self._TemplateReference__context }}",
    "a function that is not listed": "{{ lipsum(n=1) }}",
    "str.encode": "{{ 'a'.encode() }}",
    "int.to_bytes": "{{ (1).to_bytes(9, 'big') }}",
    "another template": "{% include 'secret.txt' %}",
    "a parent template": "{% extends 'secret.txt' %}",
    "an imported template": "{% import 'secret.txt' as s %}",
    "a block": "{% block a %}{{ self.a() }}{% endblock %}",
}

CHAT = [{"role": "user", "content": "hi"}]


def _render(source: str) -> tuple[str | None, str]:
    from phirt.text.chat import ChatTemplate

    try:
        return None, ChatTemplate(source).render(CHAT)
    except Exception as error:  # the class is what the test looks at
        return type(error).__name__, str(error)


if sys.platform == "win32":

    def _peak_mib() -> float:
        return float(psutil.Process().memory_info().peak_wset) / 2**20

    def _limit_memory(extra: int) -> None:
        """Windows sets no such limit; the peak is asserted all the same."""

else:
    import resource

    def _peak_mib() -> float:
        if sys.platform == "linux":
            # getrusage would count the parent's size as well, from before the exec.
            status = Path("/proc/self/status").read_text(encoding="ascii")
            kib = float(status.split("VmHWM:")[1].split()[0])
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            kib = peak / 2**10 if sys.platform == "darwin" else float(peak)
        return kib / 2**10

    def _limit_memory(extra: int) -> None:
        """Let the process grow by ``extra`` bytes at most; macOS takes the limit and ignores it."""
        size = psutil.Process().memory_info().vms + extra
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (size, size))


def main() -> None:
    """Render all attacks."""
    _render("{{ messages }}")  # import everything first
    _limit_memory(200 * 2**20)
    for name, (source, _) in ATTACKS.items():
        started = time.perf_counter()
        error, message = _render(source)
        record = [name, time.perf_counter() - started, error, message[:500], _peak_mib()]
        print(json.dumps(record), flush=True)  # noqa: T201 - it is a program


if __name__ == "__main__":
    main()
