"""Grades and verdicts: bounds, what chance is allowed, sections that break."""

from __future__ import annotations

import pytest

from phirt.quality.figures import Figures
from phirt.quality.verdict import Thresholds, grade_of, is_uncertain, judge


def figures(kl=0.0, agreement=1.0, *, kl_se=None, top1_se=None, positions=1000):
    return Figures(
        positions=positions,
        spans=10,
        ppl_reference=10.0,
        ppl=10.0,
        kl_mean=kl,
        kl_se=kl_se,
        kl_p99=kl,
        top1_agreement=agreement,
        top1_se=top1_se,
    )


@pytest.mark.parametrize(
    ("kl", "agreement", "grade"),
    [
        (0.0, 1.0, "equal"),
        (0.01, 0.95, "equal"),
        (0.0101, 0.95, "close"),
        (0.01, 0.949, "close"),
        (0.02, 0.90, "close"),
        (0.0201, 0.99, "degraded"),
        (0.001, 0.89, "degraded"),
        (1.01, 0.99, "broken"),
        (0.5, 0.49, "broken"),
        (50.0, 0.0, "broken"),
    ],
)
def test_a_grade_needs_both_figures(kl, agreement, grade):
    assert grade_of(figures(kl, agreement)) == grade


def test_two_standard_errors_are_left_to_chance():
    assert grade_of(figures(0.012, 1.0, kl_se=0.001)) == "equal"
    assert grade_of(figures(0.0121, 1.0, kl_se=0.001)) == "close"
    assert grade_of(figures(0.0, 0.93, top1_se=0.01)) == "equal"
    assert grade_of(figures(0.0, 0.92, top1_se=0.01)) == "close"


def test_what_chance_may_have_decided_is_uncertain():
    thresholds = Thresholds()
    assert is_uncertain(figures(0.019, kl_se=0.001), thresholds)
    assert is_uncertain(figures(0.0, 0.91, top1_se=0.01), thresholds)
    assert not is_uncertain(figures(0.01, 0.95, kl_se=0.001, top1_se=0.01), thresholds)


def test_the_worse_kernel_is_the_grade():
    verdict = judge({"many-row": (figures(), {}), "one-row": (figures(0.5, 0.7), {})}, Thresholds())
    assert (verdict.grade, verdict.passed) == ("degraded", False)
    assert len(verdict.reasons) == 2
    assert all("one-row" in reason for reason in verdict.reasons)


def test_thresholds_are_the_users_to_choose():
    kernels: dict[str, tuple[Figures, dict[str, Figures]]] = {"one-row": (figures(0.5, 0.7), {})}
    assert judge(kernels, Thresholds(max_kl=0.6, min_agreement=0.6)).passed
    assert not judge({"one-row": (figures(0.001), {})}, Thresholds(max_kl=0.0005)).passed


def test_one_broken_section_fails_what_is_close_on_the_whole():
    sections = {"english": figures(), "chinese": figures(2.0, 0.3, positions=100)}
    verdict = judge({"many-row": (figures(0.019, 0.95), sections)}, Thresholds())
    assert (verdict.grade, verdict.passed) == ("close", False)
    assert "'chinese' is broken" in verdict.reasons[0]


def test_a_section_of_few_positions_fails_nothing():
    sections = {"chinese": figures(2.0, 0.3, positions=20)}
    assert judge({"many-row": (figures(), sections)}, Thresholds()).passed


@pytest.mark.parametrize(
    "wrong", [{"max_kl": -1}, {"min_agreement": 1.5}, {"max_kl": float("nan")}]
)
def test_thresholds_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Thresholds(**wrong)


def test_thresholds_that_are_no_numbers():
    with pytest.raises(TypeError, match="max_kl must be a number"):
        Thresholds(max_kl=True)
