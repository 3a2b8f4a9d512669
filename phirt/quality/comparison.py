"""What a model lost against its reference: `compare_quality`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from phirt._version import __version__
from phirt.dispatch.registry import formats_of
from phirt.dispatch.shape import weights_bytes
from phirt.loading import load
from phirt.locate import meaning_of
from phirt.model import Model
from phirt.models.folder import held_formats, read_folder
from phirt.quality.figures import figures_of, histogram_of
from phirt.quality.matching import shared_vocabulary
from phirt.quality.passes import Kernel, compare_pass, lack_of_verify, longest_pass
from phirt.quality.report import (
    KERNEL_NAMES,
    KernelQuality,
    QualityReport,
    Section,
    Side,
    SpanFigures,
)
from phirt.quality.spans import Span, check_enough, cut_spans, read_sections
from phirt.quality.speed import compare_speed
from phirt.quality.verdict import Thresholds, Verdict, is_uncertain, judge
from phirt.quality.worst import Judged, worst_positions
from phirt.remote import Announce
from phirt.types import Progress, ProgressCallback

__all__ = ["DEFAULT_TOKENS", "compare_quality"]

DEFAULT_TOKENS = 4096
"""Tokens that models are compared on, unless another number is asked for."""

# Of each span the last eighth is decoded one by one: a step takes as long as many rows together.
_DECODED_SHARE = 8
# Precisions whose activations stay floats: the kernels of such a reference agree.
_FLOAT = ("fp32", "fp16", "bf16", "exact")


def compare_quality(
    reference: str | Path | Model,
    candidate: str | Path | Model,
    *,
    text: str | Path | Mapping[str, str] | None = None,
    tokens: int = DEFAULT_TOKENS,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    speed: bool = True,
    reference_device: str = "auto",
    reference_backend: str = "auto",
    reference_precision: str = "auto",
    device: str = "auto",
    backend: str = "auto",
    precision: str = "auto",
    kv_precision: str = "auto",
    offline: bool = False,
    progress: ProgressCallback | None = None,
    announce: Announce | None = None,
) -> QualityReport:
    """Say what a model lost against its reference, on text, teacher-forced.

    Both may be of any format and on any backend, as long as they are forms of one model: one
    tokenizer, one vocabulary. They are loaded at once, so the memory must hold both. See
    docs/quality.md for what the figures mean.

    Args:
        reference: What is held against: what `phirt.load` takes, or a loaded model, which
            stays open.
        candidate: What is judged, likewise.
        text: The text to compare on, a UTF-8 file of it, several texts by name (figures are
            given for each), or None for phirt's own: prose in several languages, and code.
        tokens: About how many tokens of it to run. They are taken evenly from all of the text.
        max_kl: Largest mean divergence, in nats, of a candidate that passes; None for 0.02.
        min_agreement: Least share of positions at which a candidate that passes has the same
            most likely token as the reference; None for 0.9.
        speed: Whether to time both as well.
        reference_device: The reference's ``device``, as for `phirt.load`.
        reference_backend: Its ``backend``.
        reference_precision: Its ``precision``; ``"auto"`` converts a checkpoint to fp32.
        device: The candidate's ``device``, as for `phirt.load`.
        backend: Its ``backend``.
        precision: Its ``precision``.
        kv_precision: Its ``kv_precision``. The reference's is its backend's own.
        offline: As for `phirt.load`.
        progress: As for `phirt.load`; told how many tokens are compared, too.
        announce: As for `phirt.load`.

    Raises:
        UnsupportedModelError: The models have different tokenizers or vocabularies.
        NonFiniteLogitsError: One computes NaN or infinity.
        PhirtError: One cannot be loaded, or fails.
        OSError: The file of text cannot be read.
        TypeError: An argument is of a wrong type.
        ValueError: The text is empty, too short or not UTF-8, or a setting is out of range.
    """
    thresholds = _thresholds(max_kl, min_agreement)
    _check_tokens(tokens)
    sections = read_sections(text)
    check_enough(sections, tokens)  # before models are loaded
    theirs = _Choice("reference_", reference_device, reference_backend, reference_precision)
    ours = _Choice("", device, backend, precision, kv_precision)
    for model, choice in ((reference, theirs), (candidate, ours)):
        choice.check(model)
    with ExitStack() as stack:

        def opened(model: str | Path | Model, choice: _Choice) -> Model:
            if isinstance(model, Model):
                return model
            return stack.enter_context(
                load(
                    model,
                    device=choice.device,
                    backend=choice.backend,
                    precision=choice.precision,
                    kv_precision=choice.kv_precision,
                    offline=offline,
                    progress=progress,
                    announce=announce,
                )
            )

        if not isinstance(reference, Model):
            theirs = theirs.faithful(reference)
        return _compare(
            opened(reference, theirs),
            opened(candidate, ours),
            sections,
            tokens=tokens,
            thresholds=thresholds,
            timed=speed,
            progress=progress,
        )


@dataclass(frozen=True, slots=True)
class _Choice:
    """What one of the two is to run on, and as what; and what its arguments begin with."""

    prefix: str
    device: str
    backend: str
    precision: str
    kv_precision: str = "auto"

    def check(self, model: str | Path | Model) -> None:
        """Refuse settings of a model that is loaded."""
        named = [
            f"{self.prefix}{name}"
            for name in ("device", "backend", "precision", "kv_precision")
            if getattr(self, name) != "auto"
        ]
        if isinstance(model, Model) and named:
            raise ValueError(f"{' and '.join(named)} cannot be chosen: {model!r} is loaded")

    def faithful(self, model: str | Path) -> _Choice:
        """The same, with a precision that loses nothing for ``"auto"``."""
        if self.precision != "auto":
            return self
        return replace(self, precision=_faithful_precision(model, self.backend))


def _thresholds(max_kl: float | None, min_agreement: float | None) -> Thresholds:
    given = {"max_kl": max_kl, "min_agreement": min_agreement}
    return Thresholds(**{name: value for name, value in given.items() if value is not None})


def _check_tokens(tokens: object) -> None:
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise TypeError(f"tokens must be an int, not {tokens!r}")
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1")


def _faithful_precision(reference: str | Path, backend: str) -> str:
    """What ``"auto"`` means for a reference: no loss, where it is converted at all."""
    meaning = meaning_of(reference)
    if not isinstance(meaning, Path) or not meaning.is_dir():
        return "fp32"
    held = set(held_formats(meaning))
    if backend != "auto" and held & set(formats_of(backend)):
        return "auto"  # which reads it as it is
    return "fp32" if held <= {"safetensors"} else "auto"


def _compare(
    reference: Model,
    candidate: Model,
    sections: Mapping[str, str],
    *,
    tokens: int,
    thresholds: Thresholds,
    timed: bool,
    progress: ProgressCallback | None,
) -> QualityReport:
    vocabulary = shared_vocabulary(reference, candidate, sections)
    limit = longest_pass(reference.loaded, candidate.loaded)
    spans = cut_spans(sections, reference.tokenizer, tokens=tokens, longest=limit)
    judged: dict[Kernel, list[Judged]] = {"many_rows": [], "one_row": []}
    for span in _reporting(spans, progress):
        for kernel, found in _judge_span(reference, candidate, span, vocabulary).items():
            judged[kernel].append(found)
    kernels = {kernel: _quality(found, candidate) for kernel, found in judged.items() if found}
    verdict = judge(
        {
            KERNEL_NAMES[kernel]: (
                quality.figures,
                {section.name: section.figures for section in quality.sections},
            )
            for kernel, quality in kernels.items()
        },
        thresholds,
    )
    return QualityReport(
        reference=_side(reference),
        candidate=_side(candidate),
        vocabulary=vocabulary,
        many_rows=kernels.get("many_rows"),
        one_row=kernels["one_row"],
        speed=(
            compare_speed(reference.loaded, candidate.loaded, spans[0].token_ids) if timed else None
        ),
        verdict=verdict,
        notes=tuple(_notes(reference, candidate, kernels, verdict)),
        version=__version__,
    )


def _reporting(spans: Sequence[Span], progress: ProgressCallback | None) -> Iterator[Span]:
    total, done = sum(len(span.token_ids) for span in spans), 0
    for span in spans:
        if progress is not None:
            progress(Progress("compare", done, total, "tokens"))
        yield span
        done += len(span.token_ids)
    if progress is not None:
        progress(Progress("compare", total, total, "tokens"))


def _judge_span(
    reference: Model, candidate: Model, span: Span, vocabulary: int
) -> Mapping[Kernel, Judged]:
    found = compare_pass(
        reference.loaded,
        candidate.loaded,
        [*span.prefix, *span.token_ids],
        decoded=max(1, len(span.token_ids) // _DECODED_SHARE),
        many=candidate.loaded.capabilities.verify,
        # What follows on the prefix alone would be the same in every span.
        skipped=len(span.prefix),
        vocabulary=vocabulary,
    )
    return {
        kernel: Judged(span, len(span.token_ids) - len(rows), rows)
        for kernel, rows in found.items()
    }


def _quality(judged: Sequence[Judged], candidate: Model) -> KernelQuality:
    by_section: dict[str, list[Judged]] = {}
    for each in judged:
        by_section.setdefault(each.span.section, []).append(each)
    return KernelQuality(
        figures=figures_of([each.rows for each in judged]),
        sections=tuple(
            Section(name=name, figures=figures_of([each.rows for each in found]))
            for name, found in by_section.items()
        ),
        spans=tuple(
            SpanFigures(
                section=each.span.section,
                start=each.span.start,
                positions=len(each.rows),
                kl_mean=float(each.rows.kl.mean()),
            )
            for each in judged
        ),
        histogram=histogram_of([each.rows for each in judged]),
        worst=worst_positions(judged, candidate.tokenizer),
    )


def _side(model: Model) -> Side:
    artifact = model.artifact
    folder = read_folder(artifact.path, name=artifact.name, formats=(artifact.format,))
    return Side(
        name=model.name,
        path=str(artifact.path),
        format=artifact.format,
        precision=artifact.precision,
        backend=model.backend,
        device=model.device,
        bytes=weights_bytes(folder),
        kv_precision=model.plan.kv_precision,
    )


def _notes(
    reference: Model,
    candidate: Model,
    kernels: Mapping[Kernel, KernelQuality],
    verdict: Verdict,
) -> Iterator[str]:
    if not reference.loaded.capabilities.verify:
        yield (
            "The reference decoded token by token, and is held so against both kernels of the "
            f"candidate: {lack_of_verify(reference.loaded)}."
        )
    elif reference.precision not in _FLOAT:
        yield (
            f"The reference is quantized ({reference.precision or 'of unknown precision'}): its "
            "own kernels for one row and for many differ, and it was run with those for many."
        )
    if "many_rows" not in kernels:
        yield f"There are no many-row figures: {lack_of_verify(candidate.loaded)}."
    sizes = reference.loaded.info.vocab_size, candidate.loaded.info.vocab_size
    if sizes[0] != sizes[1]:
        yield (
            f"The reference has {sizes[0]:,} logits, the candidate {sizes[1]:,}: what one of "
            "them has more is padding, and was left out."
        )
    if any(model.loaded.info.rope_boundary is not None for model in (reference, candidate)):
        yield "LongRoPE: only the factors for short contexts were run."
    for kernel, quality in kernels.items():
        if is_uncertain(quality.figures, verdict.thresholds):
            yield (
                f"A figure of the {KERNEL_NAMES[kernel]} kernels is within two standard errors "
                "of its threshold: more tokens would make the verdict surer."
            )
