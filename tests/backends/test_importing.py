"""A runtime that is missing and one that is broken are different things to say and to mend."""

import sys

import pytest

from phirt.backends.importing import import_runtime, unavailable
from phirt.errors import BackendBrokenError, BackendNotInstalledError


class TestImportRuntime:
    def test_missing(self):
        with pytest.raises(BackendNotInstalledError, match=r"phirt\[some-extra\]") as caught:
            import_runtime("no_such_runtime_xyz", backend="b", extra="some-extra")
        assert isinstance(caught.value, ImportError)

    @pytest.mark.parametrize(
        "body",
        ["import a_module_that_it_lacks", "raise OSError('libcuda.so: no such file')", "1/0"],
        ids=["lacks-a-dependency", "missing-library", "any-exception"],
    )
    def test_installed_and_broken_is_not_missing(self, tmp_path, monkeypatch, body):
        (tmp_path / "broken_runtime_xyz.py").write_text(body)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "broken_runtime_xyz", raising=False)
        with pytest.raises(BackendBrokenError, match="broken_runtime_xyz") as caught:
            import_runtime("broken_runtime_xyz", backend="b", extra="e")
        assert caught.value.__cause__ is not None


class TestUnavailable:
    def test_what_is_missing_can_be_installed(self):
        (found,) = unavailable(BackendNotInstalledError("not there"), extra="e")
        assert (found.status, found.reason) == ("missing", "not there")
        assert found.fix == 'pip install "phirt[e]"'

    def test_what_is_broken_is_not_installed_over(self):
        (found,) = unavailable(BackendBrokenError("no libcuda. Reinstall it"), extra="e")
        assert (found.status, found.fix) == ("broken", None)
        assert found.reason == "no libcuda. Reinstall it"
