"""Without OpenVINO there is nothing here to test."""

from __future__ import annotations

from importlib.util import find_spec

# Not pytest.importorskip: importing openvino that way would report it to its makers.
collect_ignore_glob = [] if find_spec("openvino") else ["test_*.py"]
