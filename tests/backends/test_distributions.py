"""Two distributions that own one package are found before it is imported."""

import sys
from pathlib import Path

import pytest

from phirt.backends.distributions import check_single_owner, find_conflicts
from phirt.backends.importing import import_runtime
from phirt.errors import BackendBrokenError


class Environment:
    """A site-packages folder of made-up distributions."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(self, name, version, *files, record=True):
        metadata = self.path / f"{name.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        if record:
            lines = [f"{file},sha256=x,1" for file in files]
            (metadata / "RECORD").write_text("\n".join(lines) + "\n")
        for file in files:
            path = self.path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")


@pytest.fixture
def environments(tmp_path, monkeypatch):
    """Two folders, in this order on the path; the rest of the path holds no such package."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder) for folder in folders])
    monkeypatch.delitem(sys.modules, "engine", raising=False)
    return [Environment(folder) for folder in folders]


@pytest.fixture
def environment(environments):
    return environments[0]


def check():
    check_single_owner("engine", backend="b")


def test_both_are_named_with_their_versions_and_the_command(environment):
    environment.install("engine", "1.31.1", "engine/__init__.py")
    environment.install("engine-webgpu", "1.27.0", "engine/__init__.py")
    with pytest.raises(BackendBrokenError) as caught:
        check()
    message = str(caught.value)
    assert "engine 1.31.1 and engine-webgpu 1.27.0" in message
    assert (
        "python -m pip uninstall -y engine engine-webgpu "
        "&& python -m pip install engine-webgpu" in message
    )


def test_a_runtime_of_two_owners_is_not_imported(environment):
    environment.install("engine", "1", "engine/__init__.py")
    environment.install("engine-gpu", "1", "engine/__init__.py")
    (environment.path / "engine" / "__init__.py").write_text("raise SystemExit")
    with pytest.raises(BackendBrokenError, match="overwrote each other"):
        import_runtime("engine", backend="b", extra="e")


def test_one_owner(environment):
    environment.install("engine", "1", "engine/__init__.py")
    check()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("engine-ep-openvino", "engine_ep_openvino/__init__.py"),
        ("engine-genai", "engine_genai/__init__.py"),
        ("engine-extensions", "engine/extensions.py"),
    ],
    ids=["a-plugin", "another-package", "a-file-inside-that-is-its-own"],
)
def test_a_distribution_that_owns_something_else(environment, name, file):
    environment.install("engine", "1", "engine/__init__.py")
    environment.install(name, "1", file)
    check()


def test_without_a_record_nothing_is_known(environment):
    environment.install("engine", "1", "engine/__init__.py")
    environment.install("engine-gpu", "1", "engine/__init__.py", record=False)
    check()


def test_an_editable_install_owns_no_files(environment):
    environment.install("engine", "1", "engine/__init__.py")
    environment.install("engine-gpu", "1", "__editable__.engine_gpu.pth")
    check()


def test_leftovers_of_an_older_version_are_the_installers_to_mend(environment):
    environment.install("engine", "1", "engine/__init__.py")
    environment.install("engine", "2", "engine/__init__.py")
    check()


def test_what_lies_behind_the_imported_package_does_not_matter(environments):
    first, second = environments
    first.install("engine", "1", "engine/__init__.py")
    second.install("engine", "2", "engine/__init__.py")
    second.install("engine-gpu", "2", "engine/__init__.py")
    check()


def test_what_lies_before_it_does(environments):
    _, second = environments
    second.install("engine", "2", "engine/__init__.py")
    second.install("engine-gpu", "2", "engine/__init__.py")
    with pytest.raises(BackendBrokenError):
        check()


def test_the_path_may_name_what_is_not_there(environment, monkeypatch, tmp_path):
    (tmp_path / "archive.zip").write_bytes(b"")
    monkeypatch.setattr(
        sys, "path", [str(tmp_path / "gone"), str(tmp_path / "archive.zip"), "", *sys.path]
    )
    environment.install("engine", "1", "engine/__init__.py")
    check()


class TestEveryConflict:
    """As the doctor looks: at all distributions, whatever their names, and at every file."""

    def conflicts(self):
        return [(each.module, dict(each.owners)) for each in find_conflicts("engine".__eq__)]

    def test_names_and_files_that_tell_nothing(self, environment):
        environment.install("engine", "1", "engine/__init__.py", "engine/a.so")
        environment.install("motor", "2", "engine/a.so")
        assert self.conflicts() == [("engine", {"engine": "1", "motor": "2"})]

    def test_packages_that_are_not_looked_at(self, environment):
        environment.install("one", "1", "tests/__init__.py")
        environment.install("two", "1", "tests/__init__.py")
        assert self.conflicts() == []

    def test_what_lies_behind_the_imported_package_does_not_matter(self, environments):
        first, second = environments
        first.install("engine", "1", "engine/__init__.py")
        for name in ("engine", "engine-gpu"):
            second.install(name, "2", "engine/__init__.py")
        assert self.conflicts() == []

    def test_what_python_compiles_and_commands_are_nobodys(self, environment):
        for name in ("engine", "engine-gpu"):
            environment.install(name, "1", "engine/__pycache__/a.pyc", "../../bin/engine")
        assert self.conflicts() == []
