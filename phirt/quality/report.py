"""What a comparison found, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phirt.devices.record_json import to_json
from phirt.quality.figures import HISTOGRAM_EDGES, Figures
from phirt.quality.passes import Kernel
from phirt.quality.speed import Speed
from phirt.quality.verdict import Verdict

__all__ = [
    "KERNEL_NAMES",
    "KernelQuality",
    "QualityReport",
    "Section",
    "Side",
    "SpanFigures",
    "WorstPosition",
]

KERNEL_NAMES: Mapping[Kernel, str] = {"many_rows": "many-row", "one_row": "one-row"}
"""What the kernels are called in sentences."""

# Told apart from other JSON files by it.
_KIND = "phirt quality report"


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two models.

    Attributes:
        name: What it is called.
        path: The folder that it was loaded from.
        format: Its layout, as in `phirt.types.Artifact`.
        precision: How its weights are stored, where that is known.
        backend: Name of the backend.
        device: Name of the device.
        bytes: Size on disk of the files that hold its graph and weights.
        kv_precision: What its KV cache was asked for in; ``"auto"`` for the backend's own.
    """

    name: str
    path: str
    format: str
    precision: str | None
    backend: str
    device: str
    bytes: int
    kv_precision: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """The figures of one section of the text.

    Attributes:
        name: Its name.
        figures: Those of its spans.
    """

    name: str
    figures: Figures


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanFigures:
    """The divergence of one span of the text.

    Attributes:
        section: The section that it is of.
        start: Number of its first token in the section, from 0.
        positions: Predictions that were judged.
        kl_mean: Their mean divergence, in nats.
    """

    section: str
    start: int
    positions: int
    kl_mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstPosition:
    """The position of a span at which the divergence is largest.

    Attributes:
        section: The section of the text.
        position: Number of the token there that was to be predicted, from 0.
        before: The text before it.
        token: The token that the text has there, as text.
        after: The text after it.
        reference_token: What the reference finds most likely, as text.
        reference_probability: How likely it finds that.
        candidate_token: What the candidate finds most likely, as text.
        candidate_probability: How likely it finds that.
        kl: The divergence, in nats.
    """

    section: str
    position: int
    before: str
    token: str
    after: str
    reference_token: str
    reference_probability: float
    candidate_token: str
    candidate_probability: float
    kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelQuality:
    """What was found with one kind of the candidate's kernels.

    Attributes:
        figures: Those of the whole text.
        sections: Those of each section, in order.
        spans: The divergence along the text, in order.
        histogram: Positions by divergence, between the edges
            `phirt.quality.figures.HISTOGRAM_EDGES`.
        worst: The worst positions, at most one of a span, worst first.
    """

    figures: Figures
    sections: tuple[Section, ...]
    spans: tuple[SpanFigures, ...]
    histogram: tuple[int, ...]
    worst: tuple[WorstPosition, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityReport:
    """What a candidate lost against its reference.

    Attributes:
        reference: What was held against.
        candidate: What was judged.
        vocabulary: Logits that were compared at each position.
        many_rows: What was found with the kernels that run a prompt, or None where the
            candidate lacks the capability ``verify``.
        one_row: What was found with those that decode token by token.
        speed: Speeds of both, or None where they were not timed.
        verdict: What it amounts to.
        notes: What the reader should know of how the figures came about, in sentences.
        version: Of phirt.
    """

    reference: Side
    candidate: Side
    vocabulary: int
    many_rows: KernelQuality | None
    one_row: KernelQuality
    speed: Speed | None
    verdict: Verdict
    notes: tuple[str, ...]
    version: str

    @property
    def kernels(self) -> Mapping[Kernel, KernelQuality]:
        """What was found, by the kernels."""
        both: dict[Kernel, KernelQuality | None] = {
            "many_rows": self.many_rows,
            "one_row": self.one_row,
        }
        return {kernel: found for kernel, found in both.items() if found is not None}

    @property
    def leading(self) -> KernelQuality:
        """What rests on the most positions: the many-row kernels where they could be run."""
        return self.many_rows or self.one_row

    def to_json(self) -> dict[str, Any]:
        """The report as a document of JSON, with its ``kind`` and the edges of histograms."""
        document: dict[str, Any] = to_json(self)
        return {"kind": _KIND, **document, "histogram_edges": list(HISTOGRAM_EDGES)}

    def save(self, folder: str | Path) -> Path:
        """Write it as a folder of a page in Markdown, plots, and the same in JSON.

        Args:
            folder: Where to: a new folder, an empty one, or an earlier report, which is
                replaced.

        Returns:
            The page.

        Raises:
            FileExistsError: There is something else.
            BackendNotInstalledError: matplotlib is missing, which draws the plots.
            OSError: It cannot be written.
        """
        # Imported here: few reports are written.
        from phirt.quality.folder import write_report

        return write_report(self, Path(folder))

    @staticmethod
    def is_report(path: Path) -> bool:
        """Whether a file is a report in JSON, as `save` writes it."""
        try:
            document = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(document, dict) and document.get("kind") == _KIND
