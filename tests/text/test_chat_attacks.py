"""Hostile chat templates: refused, or ended within the stated time and memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from phirt.errors import ModelFormatError, UnsafeModelError
from phirt.text.chat import ChatTemplate
from tests.text import template_attacks
from tests.text.template_attacks import ATTACKS, CHAT, ESCAPES

SECONDS = 2
MEBIBYTES = 200


@pytest.fixture(scope="module")
def outcomes():
    """All attacks in a process of their own, one after another, under a limit of memory."""
    program = str(Path(template_attacks.__file__))
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: outcome for name, *outcome in records}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_on_time_or_memory_is_ended(outcomes, name):
    seconds, error, message, _ = outcomes[name]
    assert (error, seconds < 5 * SECONDS) == ("UnsafeModelError", True)  # five times slack
    assert re.search(ATTACKS[name][1], message), message


def test_all_attacks_together_stay_below_the_memory_bound(outcomes):
    assert max(peak for *_, peak in outcomes.values()) < MEBIBYTES


@pytest.mark.parametrize("attribute", ["gi_frame", "gi_code"])
def test_filters_hand_out_no_generators(attribute):
    """Their frames lead out, and long chains of them overflow the stack as they are freed."""
    source = "{{ ([1] | map('string'))." + attribute + " is undefined }}"
    assert ChatTemplate(source).render(CHAT) == "True"


def test_what_filters_hand_out_behaves_as_generators_do():
    """True even where nothing is in it, and gone once it was read."""
    source = (
        "{% set x = [] | select %}{% set y = [1, 2] | select %}"
        "{{ 'yes' if x else 'no' }} {{ y | list }} {{ y | list }}"
    )
    assert ChatTemplate(source).render(CHAT) == "yes [1, 2] []"


@pytest.mark.parametrize("source", ESCAPES.values(), ids=ESCAPES.keys())
def test_a_way_out_of_the_sandbox_is_refused(source):
    with pytest.raises(UnsafeModelError, match="chat template"):
        ChatTemplate(source).render(CHAT)


@pytest.mark.parametrize(
    "expression",
    ["''.__class__", "lipsum.__globals__", "messages.__init__", "[].x.y.__mro__"],
)
def test_a_spelled_out_way_is_refused_before_anything_is_rendered(expression):
    with pytest.raises(UnsafeModelError, match="leads out of its sandbox"):
        ChatTemplate("{% if false %}{{ " + expression + " }}{% endif %}")


def test_payments_cannot_be_named_by_a_template():
    with pytest.raises(ModelFormatError, match="unknown filter 'phirt pay'"):
        ChatTemplate("{{ [-10**9] | map('phirt pay') | list }}").render(CHAT)


def test_messages_are_not_changed_by_a_template():
    chat = [{"role": "user", "content": "hi", "list": [1]}]
    source = "{% set m = messages[0] %}{% set m = dict(m, role='x') %}{{ m.role }}{{ m.list }}"
    assert ChatTemplate(source).render(chat) == "x[1]"
    assert chat == [{"role": "user", "content": "hi", "list": [1]}]


def test_budgets_grow_with_the_messages():
    source = "{% for m in messages %}{{ m.content.split('</think>')[-1] | trim }}{% endfor %}"
    long_chat = [{"role": "user", "content": "word " * 200_000}] * 3
    assert len(ChatTemplate(source).render(long_chat)) == 3 * (5 * 200_000 - 1)
    many = [{"role": "user", "content": "x"}] * 20_000
    assert ChatTemplate(source).render(many) == "x" * 20_000


def test_a_budget_is_of_one_render():
    template = ChatTemplate("{{ 'a' * 900000 }}")
    assert {len(template.render(CHAT)) for _ in range(30)} == {900_000}


def test_threads_do_not_share_a_budget():
    template = ChatTemplate("{% for i in range(5000) %}{{ i }}{% endfor %}")
    alone = template.render(CHAT)
    rendered = []
    threads = [
        threading.Thread(target=lambda: rendered.append(template.render(CHAT))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rendered == [alone] * 8
