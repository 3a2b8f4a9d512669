"""Without OpenVINO there is nothing here to test."""

from __future__ import annotations

from importlib.util import find_spec

from tests.installed import ALL_REQUIRED

# Not pytest.importorskip: importing openvino that way would report it to its makers.
# Where all runtimes are required, the files are collected, and say what is missing.
collect_ignore_glob = [] if ALL_REQUIRED or find_spec("openvino") else ["test_*.py"]
