"""What the written pages say about the tree is true of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from phirt import errors
from phirt.backends.mlx.adapter import _KINDS as MLX
from phirt.backends.onnxruntime.providers import _TABLE as ONNXRUNTIME
from phirt.backends.onnxruntime_genai.config import PROVIDERS as GENAI
from phirt.backends.openvino.adapter import _KINDS as OPENVINO
from phirt.backends.transformers.devices import _KINDS as TRANSFORMERS

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/backends").glob("*.md")]
# Kinds of devices that each backend has a way to.
DEVICES = {
    "onnxruntime": {row.device for row in ONNXRUNTIME},
    "onnxruntime-genai": set(GENAI),
    "openvino": set(OPENVINO),
    "mlx": set(MLX),
    "transformers": set(TRANSFORMERS),
    "reference": {"cpu"},
}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_within_the_tree_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_readme_has_the_one_command_that_ci_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- CI runs the next command -->\n```sh\n(.*?)```", readme, re.DOTALL)
    assert blocks == ["python -m pip install nox && python -m nox\n"]


def test_readme_starts_with_the_main_job():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.search(r"```sh\n(.*?)\n```", readme, re.DOTALL)
    assert first
    assert re.fullmatch(r'python -m pip install "\.\[cpu\]" && phirt run ".+"', first[1])


def test_the_page_of_errors_draws_the_whole_tree():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    tree, _, tables = page.partition("```text")[2].partition("```")
    assert sorted(re.findall(r"\w+Error", re.sub(r"\(.*?\)", "", tree))) == sorted(errors.__all__)
    families = {"PhirtError", *(base.__name__ for base in errors.PhirtError.__subclasses__())}
    explained = set(re.findall(r"^\| `(\w+)`", tables, re.MULTILINE))
    assert explained == set(errors.__all__) - families


def test_the_docstring_of_the_errors_draws_the_same_tree():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    tree = page.partition("```text\n")[2].partition("```")[0]
    assert re.sub(r"(?m)^", "    ", tree.rstrip()) in (errors.__doc__ or "")


def test_the_table_of_devices_has_those_that_adapters_know():
    page = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    _, names = page.split("\n## Names\n")
    header, _, *rows = [line for line in names.splitlines() if line.startswith("|")]
    backends = re.findall(r"\[([\w-]+)\]", header)
    listed = {backend: set[str]() for backend in backends}
    for row in rows:
        device, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        for backend, cell in zip(backends, cells, strict=True):
            if cell:
                listed[backend].add(device.strip("`").removesuffix("[:n]"))
    assert listed == DEVICES


def test_the_page_of_hardware_has_every_backend_on_every_device_once():
    page = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| (`[^|]+) \| ([^|]+) \|", page, re.MULTILINE)
    cells = [
        (backend, device)
        for backend, devices, _ in rows
        for device in re.findall(r"`([\w-]+)`", devices)
    ]
    wanted = [(backend, device) for backend, devices in DEVICES.items() for device in devices]
    assert sorted(cells) == sorted(wanted)


def test_there_are_examples():
    names = {example.stem for example in EXAMPLES}
    assert {"generate", "stream", "chat", "custom_processor", "change_params"} <= names


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_is_short(example):
    assert len(example.read_text(encoding="utf-8").splitlines()) < 40
