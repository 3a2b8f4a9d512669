"""Writes a report as a folder: a page, plots, and the data. All of it, or nothing."""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from phirt.errors import BackendNotInstalledError
from phirt.quality.markdown import page_of
from phirt.quality.report import QualityReport

__all__ = ["PAGE", "check_report_folder", "write_report"]

PAGE = "report.md"
"""The file to begin with."""

_DATA = "report.json"
_PLOTS = {
    "sections": "kl-sections.svg",
    "histogram": "kl-histogram.svg",
    "spans": "kl-spans.svg",
}


def check_report_folder(folder: Path) -> None:
    """Make sure that a report can be written, before minutes are spent on what is in it.

    Raises:
        FileExistsError: The folder holds anything else than an earlier report, or is a file.
        BackendNotInstalledError: matplotlib is missing, which draws the plots.
    """
    if find_spec("matplotlib") is None:
        raise BackendNotInstalledError(
            "A report has plots, which need the package 'matplotlib', and it is not installed. "
            'Install it with: python -m pip install "phirt[report]"'
        )
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"The report cannot be written to {folder}: it is a file.")
    found = {path.name for path in folder.iterdir()}
    foreign = sorted(found - {PAGE, _DATA, *_PLOTS.values()})
    if foreign:
        raise FileExistsError(
            f"The report cannot be written to {folder}: it holds {foreign[0]!r}, which is of no "
            "report. Name a new or an empty folder."
        )
    if found and not QualityReport.is_report(folder / _DATA):
        raise FileExistsError(
            f"The report cannot be written to {folder}: what it holds is no report of phirt. "
            "Name a new or an empty folder."
        )


def write_report(report: QualityReport, folder: Path) -> Path:
    """As `QualityReport.save`."""
    check_report_folder(folder)
    # Imported here: it is only there with the extra.
    from phirt.quality.plots import draw_plots

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        document = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        (new / _DATA).write_text(document + "\n", encoding="utf-8", newline="\n")
        draw_plots(report, _PLOTS, new)
        page = page_of(report, plots=list(_PLOTS.values()), data=_DATA)
        (new / PAGE).write_text(page, encoding="utf-8", newline="\n")
        # The old one goes into the scratch folder, and with it, once the new one is there.
        if folder.exists():
            folder.replace(Path(scratch) / "old")
        try:
            new.replace(folder)
        except OSError:
            _restore(Path(scratch) / "old", folder)
            raise
    return folder / PAGE


def _restore(old: Path, folder: Path) -> None:
    if old.exists() and not folder.exists():
        shutil.move(old, folder)
