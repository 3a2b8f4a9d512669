"""Chat templates in the manner of published models, written for these tests."""

# ruff: noqa: E501 (a line break in a template is a line break in its output)

from __future__ import annotations

__all__ = ["EXPRESSIONS", "TEMPLATES"]

TEMPLATES = {
    "ChatML": """\
{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "Llama 3": """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ "\\n\\n" }}{% endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ (message.content | trim) ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "Phi-3": """\
{% for message in messages %}
{% if message['role'] in ['system', 'user', 'assistant'] %}
{{'<|' + message['role'] + '|>
' + message['content'] + '<|end|>
'}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}""",
    "Mistral": """\
{%- set ns = namespace(system=none, turn=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}{{ raise_exception('The system message comes first.') }}{% endif %}
        {%- set ns.system = message.content %}
        {%- continue %}
    {%- endif %}
    {%- if (message.role == 'user') != (ns.turn % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant; not ' + message.role) }}
    {%- endif %}
    {%- set ns.turn = ns.turn + 1 %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' }}
        {%- if ns.system and loop.last %}{{ ns.system + '\\n\\n' }}{% endif %}
        {{- message.content + '[/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "Gemma": """\
{{ bos_token }}{% for message in messages %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{% if role == 'system' %}{% continue %}{% endif %}
{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}
""",
    "Qwen with tools and thinking": """\
{%- macro describe(tool, depth=0) -%}
    {{ '  ' * depth }}{{ tool.function.name }}: {{ tool.function.description | default('none', true) }}
    {%- for name, spec in tool.function.parameters.properties.items() | sort %}
        {{- '\\n' + '  ' * (depth + 1) + name + (' (' ~ spec.type ~ ')' if spec.type is string else '') }}
    {%- endfor %}
{%- endmacro %}
{%- if tools %}{{ '# Tools\\n' }}{% for tool in tools %}{{ describe(tool) }}{{ tool | tojson }}{% endfor %}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if ns.last < 0 and message.role == 'user' %}{% set ns.last = messages|length - loop.index0 - 1 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if '</think>' in message.content %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- else %}{% set content = message.content %}{% endif %}
    {%- if message.role == 'assistant' %}{% generation %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
        {{- content }}
    {%- endgeneration %}{% else %}
        {{- '<|im_start|>%s\\n%s' % (message.role, content) }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}""",
    "everything else": """\
{%- set found = [] %}
{% for message in messages if message.role != 'system' %}
  {{ loop.index }}/{{ loop.length }} {{ loop.revindex }} {{ loop.cycle('odd', 'even') }} {{ loop.changed(message.role) }} {{ loop.previtem.role if not loop.first }} {{ loop.nextitem.role if not loop.last }}
    {# a comment #}
  {%- if loop.index > 3 %}{% break %}{% endif %}
  {%- set found = found + [message.role] %}
{% else %}nobody
{% endfor %}
{{ found }} {{ messages | map(attribute='role') | unique | list }}
{% for group in messages | groupby('role') %}{{ group.grouper }}={{ group.list | length }} {% endfor %}
{% filter upper %}shout {{ messages[0].role }}{% endfilter %}
{% set block %}captured {{ bos_token }}{% endset %}{{ block }}
{% macro outer() %}<{{ caller(1) }}|{{ caller(2) }}>{% endmacro %}
{% call(n) outer() %}{{ n }}{{ messages[0].content | length }}{% endcall %}
{% for part in [[1, [2]], [3]] recursive %}{% if part is iterable %}({{ loop(part) }}){% else %}{{ part }}@{{ loop.depth }}{% endif %}{% endfor %}
{% with a = 1, b = 'x' %}{{ a }}{{ b }}{% endwith %}
{% set commas = joiner(', ') %}{% for x in 'abc' %}{{ commas() }}{{ x }}{% endfor %}
{% set colours = cycler('red', 'blue') %}{{ colours.next() }}{{ colours.next() }}{{ colours.next() }}
{% raw %}{{ not rendered }}{% endraw %}
   {% if missing is undefined or true %}left stripped{% endif %}

end
""",
}

EXPRESSIONS = [
    "1 + 2 * 3 - 4 // 3 + 5 % 3 + 2 ** 5",
    "7 / 2, 7 // 2, -7 % 3, 1.5 * 2, 2 ** -1, -3, +3",
    "'a' + 'b' ~ 1 ~ none ~ true ~ [1, 'x'] ~ {'k': 'v'}",
    "'ab' * 3, 3 * 'ab', [1, 2] * 2, [1] + [2], (1,) + (2,)",
    "1 < 2 <= 2 != 3, 'a' in 'abc', 'z' not in ['z'], 1 == 1.0, [1] == [1]",
    "'%s-%05d-%.3f-%(x)s' | replace('%(x)s', '%%') | format('a', 42, 3.14159)",
    "'%s and %s' % ('x', 1), '%d%%' % 7, '%(a)s%(a)s' % {'a': 'b'}",
    "'{} {1} {a!r:>8}'.replace('{} ', '{0} ').format('x', 'y', a='z')",
    "'{:>10}|{:^7}|{:.2f}|{:,}'.format('r', 'c', 3.14159, 1234567)",
    "'{a[0]}{b.k}'.format(a=[1], b={'k': 2}), '{k}'.format_map({'k': 3})",
    "[3, 1, 2] | sort, [3, 1, 2] | sort(reverse=true) | list, 'hello' | reverse",
    "[1, 2, 3] | reverse | list, (1, 2) | join('-'), [1, none, 'x'] | join, 'abc' | join('.')",
    "['b', 'A'] | sort, ['b', 'A'] | sort(case_sensitive=true), {'b': 1, 'a': 2} | dictsort",
    "[{'a': 2}, {'a': 1}] | sort(attribute='a'), [{'a': 2}] | map(attribute='a') | sum",
    "range(5) | list, range(2, 10, 3) | list, range(0), range(7) | batch(3, 'x') | list",
    "range(7) | slice(3) | list, range(4) | select('odd') | list, range(4) | reject('odd') | list",
    "messages | selectattr('role', 'equalto', 'user') | list | length",
    "messages | rejectattr('role', 'in', ['user']) | map(attribute='content') | list",
    "['a', 'b'] | map('upper') | join, [1, 2] | map('string') | list",
    "[1, 2, 3] | sum, [1, 2, 3] | max, 'bca' | min, [1.5] | sum(start=1), [] | max",
    "'Hello World' | upper, 'HELLO' | lower, 'hello world' | title, 'hello' | capitalize",
    "'  x ' | trim, 'xxaxx' | trim('x'), 'a b c' | wordcount, 'hi' | center(9)",
    "'one\\ntwo\\n\\nthree' | indent, 'one\\ntwo' | indent(2, true), 'a\\nb' | indent('> ')",
    "'a long sentence here' | truncate(10), 'abc' | truncate(2, true, '')",
    "1.55 | round(1), 2.5 | round, 1.2 | round(0, 'ceil'), -3 | abs, '3' | int, 'x' | int(9)",
    "'ff' | int(0, 16), '2.5' | float, '1' | string, none | string, [1] | string",
    "missing | default('d'), '' | default('d', true), none | d('x'), missing is defined",
    "[1, 2] | first, [1, 2] | last, 'abc' | first, [] | first, {'a': 1} | length, 'abc' | count",
    "{'a': 1, 'b': [2, {'c': none}]} | tojson, {'é': '<&>\"\\''} | tojson, 'é' | tojson(ensure_ascii=true)",
    "{'b': 1, 'a': [1, 2]} | tojson(indent=2), {'b': 1, 'a': 2} | tojson(sort_keys=true)",
    "{'a': [1, 2]} | tojson(separators=(',', ':')), [] | tojson, 1.0 | tojson, true | tojson",
    "'<b>' | e, '<b>' | escape | upper, ('<b>' | safe) + '<i>', ('%s' | safe) % '<i>'",
    "('{}' | safe).format('<i>'), ('<b>' | e) ~ '<i>', ['<', '>' | safe] | join",
    "'a,b,c'.split(','), ' a  b '.split(), 'a,b,c'.rsplit(',', 1), 'a\\nb'.splitlines()",
    "'abc'.startswith('a'), 'abc'.endswith(('b', 'c')), 'abc'.find('c'), 'abcabc'.rfind('b')",
    "'abc'.replace('b', 'x'), 'aaa'.replace('a', 'b', 2), 'abc'.upper(), 'aBc'.swapcase()",
    "'-'.join(['a', 'b']), ','.join(['a', 'b'] | map('upper')), 'a=b=c'.partition('=')",
    "'xxax'.strip('x'), ' a '.lstrip(), ' a '.rstrip(), 'a'.center(5, '*'), '7'.zfill(3)",
    "'abc'.ljust(5) ~ '|', 'abc'.rjust(5), 'prefix'.removeprefix('pre'), 'abc'.count('b')",
    "'a1'.isalnum(), 'a'.isalpha(), '1'.isdigit(), ' '.isspace(), 'A'.isupper(), 'a b'.title()",
    "{'a': 1}.items() | list, {'a': 1}.keys() | list, {'a': 1}.get('b', 2), {'a': 1}.values() | list",
    "{'a': 1} | items | list, dict(a=1, b=2), dict([('k', 'v')]), dict.fromkeys(['a'], 0)",
    "[1, 2, 1].count(1), [1, 2].index(2), (1, 2).index(1), 2.0.is_integer()",
    "'abcdef'[1:4], 'abcdef'[::-1], [1, 2, 3][-1], [1, 2, 3][:-1], 'abc'[0], (1, 2)[1:]",
    "messages[0]['role'], messages[0].role, messages[-1].content, messages[0].nothing, messages[99]",
    "1 is number, 'a' is string, [] is sequence, {} is mapping, none is none, true is boolean",
    "3 is odd, 4 is even, 9 is divisibleby 3, 1 is eq 1, 2 is gt 1, 1 is in [1], 'a' is lower",
    "missing is none, missing == none, not missing, missing ~ 'x', 1.0 is float, 1 is integer",
    "'yes' if 1 else 'no', 'yes' if 0, (1 and 2) or 3, not true, 0 or 'x'",
    "messages | attr('nothing'), 'abc' | attr('upper') is callable, [1, 1, 2] | unique | list",
    "namespace(a=1, b=2).a, '' ~ namespace(a=1), lipsum is callable, range is callable",
    "0x1F, 1_000, 1e3, 'é😀', '\\u00e9', \"it's\", 'tab\\t'",
    "'a' 'b', ('x',), [], {}, (1, 2, 3) | list, 'abc' | list, {'a': 1} | list",
]
