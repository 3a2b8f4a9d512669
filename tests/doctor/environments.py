"""Made-up installations: folders of packages, wheels, and virtual environments that take them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import phirt

# Looks at the packages and versions of whatever environment runs it, and asks no runtime.
LOOK = """
import json
from dataclasses import asdict
from phirt.doctor.packages import examine_packages, read_installed
from phirt.doctor.versions import examine_versions
installed = read_installed()
found = [*examine_packages(installed), *examine_versions(installed)]
print(json.dumps([asdict(each) for each in found]))
"""


def metadata(
    name: str, version: str, requires: Sequence[str] = (), extras: Sequence[str] = ()
) -> str:
    """The METADATA of a distribution."""
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {each}" for each in requires]
    lines += [f"Provides-Extra: {each}" for each in extras]
    return "\n".join(lines) + "\n"


def write_wheel(
    folder: Path,
    name: str,
    version: str,
    files: Mapping[str, str],
    *,
    requires: Sequence[str] = (),
    extras: Sequence[str] = (),
) -> Path:
    """A wheel with these files, as pip installs it."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    content = {
        **files,
        f"{info}/METADATA": metadata(name, version, requires, extras),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{path},{hashed(text)},{len(text.encode())}" for path, text in content.items()]
    content[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    folder.mkdir(exist_ok=True)
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in content.items():
            archive.writestr(file, text)
    return path


def hashed(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


class Environment:
    """A virtual environment, in which all that runs the tests can be imported, too.

    What is installed in it comes first, and is all that pip changes. Its index is a folder of
    wheels.
    """

    def __init__(self, root: Path) -> None:
        self.wheels = root / "wheels"
        self.wheels.mkdir(parents=True)
        venv.create(root / "venv", with_pip=False)
        self.scripts = root / "venv" / ("Scripts" if os.name == "nt" else "bin")
        self.python = str(self.scripts / "python")
        (self.site,) = (root / "venv").rglob("site-packages")
        hosts = [str(Path(phirt.__file__).parent.parent), *filter(os.path.isdir, sys.path)]
        (self.site / "hosts.pth").write_text("\n".join(dict.fromkeys(hosts)), encoding="utf-8")

    def run(self, command: str | Sequence[str], **more: str) -> str:
        """What a command prints, with the environment active, as its user has it."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        path = f"{self.scripts}{os.pathsep}{kept['PATH']}"
        # Whoever runs the tests has settings of pip's, such as an index.
        pip = {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        ran = subprocess.run(
            command,
            shell=isinstance(command, str),
            env=kept | pip | {"PATH": path} | more,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def offer(
        self,
        name: str,
        version: str,
        *files: str,
        requires: Sequence[str] = (),
        extras: Sequence[str] = (),
    ) -> Path:
        """Put a distribution of these files into the index."""
        content = dict.fromkeys(files, f"# of {name} {version}\n")
        return write_wheel(self.wheels, name, version, content, requires=requires, extras=extras)

    def install(self, name: str, version: str, *files: str, **more: Sequence[str]) -> None:
        """Offer a distribution, and unpack it over whatever is there, as an installer does."""
        with zipfile.ZipFile(self.offer(name, version, *files, **more)) as wheel:
            wheel.extractall(self.site)

    def look(self) -> list[dict[str, Any]]:
        """What the doctor says of packages and versions, without what is right."""
        found: list[dict[str, Any]] = json.loads(self.run([self.python, "-c", LOOK]))
        return [each for each in found if each["severity"] != "ok"]
