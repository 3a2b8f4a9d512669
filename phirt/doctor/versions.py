"""Whether the versions of the installed runtimes fit together, and phirt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution
from typing import TYPE_CHECKING

from phirt.backends.distributions import listed_files
from phirt.doctor.commands import install, replace, uninstall
from phirt.doctor.finding import Finding
from phirt.doctor.packages import canonical, is_runtime

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = ["examine_versions"]

_PHIRT = "phirt"
# Required, and not missed: OpenVINO brings a stub for it, and phirt keeps it away anyway.
_NOT_MISSED = {"openvino-telemetry"}
# What plugins to onnxruntime ask of it in their descriptions, since a Requires-Dist would
# bring the plain wheel in beside one for a GPU:
#   onnxruntime-ep-openvino 1.8.1: its METADATA, "Prerequisites"
#   onnxruntime-ep-webgpu 0.5.0: its description on the index, "Prerequisites"
#   onnxruntime-ep-nv-tensorrt-rtx 0.5.0: nvidia.github.io/TensorRT-RTX-EP-ABI, "Requirements"
_OF_PLUGINS = {
    "onnxruntime-ep-openvino": "onnxruntime>=1.23.0",
    "onnxruntime-ep-webgpu": "onnxruntime>=1.24.4",
    "onnxruntime-ep-nv-tensorrt-rtx-cu12": "onnxruntime>=1.24",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13": "onnxruntime>=1.24",
}
# What extras hold to convert models with, and no runtime: it may be there for another extra.
_CONVERTING = {"gguf", "onnx"}
# Where several distributions hold one package, any of them does for a requirement.
_SHARED = {"onnxruntime": "onnxruntime", "onnxruntime-genai": "onnxruntime_genai"}


@dataclass(frozen=True, slots=True)
class _Need:
    """A requirement, who has it, and whether that is phirt or what one of its extras asks for."""

    by: str
    requirement: Requirement
    ours: bool = False

    @property
    def name(self) -> str:
        return canonical(self.requirement.name)

    @property
    def text(self) -> str:
        """What to install, without the conditions."""
        extras = f"[{','.join(sorted(self.requirement.extras))}]" if self.requirement.extras else ""
        return f"{self.requirement.name}{extras}{self.requirement.specifier}"


def examine_versions(installed: Mapping[str, Distribution]) -> Iterator[Finding]:
    """Requirements of phirt, of the installed runtimes and of their plugins that are not met."""
    stand_ins = _stand_ins(installed)
    told: set[tuple[str, str]] = set()
    needs = [*_needs_of_phirt(installed), *_needs_of_runtimes(installed)]
    for need in needs:
        held = stand_ins.get(need.name) or installed.get(need.name)
        if held is not None and need.requirement.specifier.contains(held.version, prereleases=True):
            continue
        if held is not None and _is_mended_with_ours(need, held, installed):
            continue
        if (need.by, need.name) not in told:
            told.add((need.by, need.name))
            yield _describe(need, held, installed)
    if needs and not told:
        yield Finding(
            severity="ok",
            area="versions",
            found=f"{len(needs)} requirements of phirt and its runtimes are met.",
        )


def _needs_of_phirt(installed: Mapping[str, Distribution]) -> Iterator[_Need]:
    """Those of its base, and of every extra whose runtime is installed."""
    if _PHIRT not in installed:
        return  # a checkout that is only on the path
    yield from _needs(installed, installed[_PHIRT], by=_PHIRT, ours=True)
    for extra in installed[_PHIRT].metadata.get_all("Provides-Extra") or ():
        by = f"{_PHIRT}[{extra}]"
        needs = list(_needs(installed, installed[_PHIRT], by=by, extra=extra, ours=True))
        # Builders sort them as they like, so that the runtime's place among them says nothing.
        own = [need for need in needs if need.by == by]
        runtime = [need for need in own if need.name not in _CONVERTING]
        if runtime and all(need.name in installed for need in runtime):
            yield from needs


def _needs_of_runtimes(installed: Mapping[str, Distribution]) -> Iterator[_Need]:
    from packaging.requirements import Requirement

    runtimes = {
        name
        for name, distribution in installed.items()
        if name != _PHIRT and any(map(is_runtime, _packages(distribution)))
    }
    for name, distribution in sorted(installed.items()):
        by = f"{distribution.name} {distribution.version}"
        needs = list(_needs(installed, distribution, by=by)) if name != _PHIRT else []
        # What needs a runtime is looked at too: an installer would change it back for that.
        yield from needs if name in runtimes else [need for need in needs if need.name in runtimes]
        if name in _OF_PLUGINS:
            yield _Need(by, Requirement(_OF_PLUGINS[name]))


def _needs(
    installed: Mapping[str, Distribution],
    distribution: Distribution,
    *,
    by: str,
    extra: str = "",
    ours: bool = False,
) -> Iterator[_Need]:
    """What a distribution requires here; with an extra, only what that adds.

    Of what is required with an extra (``mlx[cpu]``), the extra's requirements too.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    for text in distribution.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # by the rules of ten years ago; pip passes over it, too
            continue
        marker = requirement.marker
        holds = marker is None or marker.evaluate({"extra": extra})
        without = marker is None or marker.evaluate({"extra": ""})
        if not holds or (extra and without) or canonical(requirement.name) in _NOT_MISSED:
            continue
        yield _Need(by, requirement, ours)
        held = installed.get(canonical(requirement.name))
        if held is None:
            continue
        for inner in sorted(requirement.extras):
            inner_by = f"{held.name}[{inner}] {held.version}"
            yield from _needs(installed, held, by=inner_by, extra=inner, ours=ours)


def _packages(distribution: Distribution) -> set[str]:
    return {file.partition("/")[0] for file in listed_files(distribution)}


def _stand_ins(installed: Mapping[str, Distribution]) -> dict[str, Distribution]:
    """The build that is installed in place of a plain one: onnxruntime-gpu for onnxruntime."""
    found = {}
    for plain, package in _SHARED.items():
        for name, distribution in installed.items():
            if plain in installed or not name.startswith(f"{plain}-"):
                continue
            if f"{package}/__init__.py" in listed_files(distribution):
                found[plain] = distribution
    return found


def _describe(
    need: _Need, held: Distribution | None, installed: Mapping[str, Distribution]
) -> Finding:
    if held is None:
        return Finding(
            severity="broken",
            area="versions",
            found=f"{need.by} needs {need.text}, which is not installed.",
            why="What needs it fails when it is imported or first used.",
            command=install(need.text),
        )
    found = f"{need.by} needs {need.text}; installed is {held.name} {held.version}."
    if canonical(held.name) != need.name:
        return Finding(
            severity="warning",
            area="versions",
            found=found,
            why=(
                f"{held.name} stands in for {need.requirement.name}, in another version. If there "
                f"is a newer {held.name}, update it instead of taking the plain build."
            ),
            command=replace([held.name], need.text),
        )
    opposed = _opposed(need, held, installed) if need.ours else []
    if opposed:
        names = " and ".join(f"{one.name} {one.version}" for one in opposed)
        return Finding(
            severity="broken",
            area="versions",
            found=found,
            why=(
                f"{names} cannot be in one environment with it: an installer takes "
                f"{held.name} back to a version that suits them. Give them one of their own."
            ),
            command=replace([one.name for one in opposed], need.text),
        )
    if need.ours or _is_wanted(need, installed):
        why = "It was not tried with this version, and may fail or compute something else."
        return Finding(
            severity="warning", area="versions", found=found, why=why, command=install(need.text)
        )
    owner = need.by.rpartition(" ")[0]
    return Finding(
        severity="warning",
        area="versions",
        found=found,
        why=(
            f"phirt needs the version that is installed. {owner} may not work, and updating it "
            "may take the version back: give it an environment of its own."
        ),
        command=uninstall([owner]),
    )


def _opposed(
    need: _Need, held: Distribution, installed: Mapping[str, Distribution]
) -> list[Distribution]:
    """Distributions that allow the version that is installed, and not what phirt needs."""
    found = []
    for name, distribution in sorted(installed.items()):
        for other in _needs(installed, distribution, by=name) if name != _PHIRT else ():
            allowed = other.requirement.specifier
            if other.name != need.name or not allowed.contains(held.version, prereleases=True):
                continue
            if any(not allowed.contains(version, prereleases=True) for version in _lowest(need)):
                found.append(distribution)
    return found


def _is_wanted(need: _Need, installed: Mapping[str, Distribution]) -> bool:
    """Whether changing the installed version for this need leaves phirt's own needs met."""
    ours = [other for other in _needs_of_phirt(installed) if other.name == need.name]
    return not ours or any(
        other.requirement.specifier.contains(version, prereleases=True)
        for version in _lowest(need)
        for other in ours
    )


def _is_mended_with_ours(
    need: _Need, held: Distribution, installed: Mapping[str, Distribution]
) -> bool:
    """Whether phirt needs another version too, and the one that it needs would do."""
    return not need.ours and any(
        other.name == need.name
        and not other.requirement.specifier.contains(held.version, prereleases=True)
        and all(need.requirement.specifier.contains(each) for each in _lowest(other))
        for other in _needs_of_phirt(installed)
    )


def _lowest(need: _Need) -> list[str]:
    """The version that a requirement begins with, if it names one."""
    return [each.version for each in need.requirement.specifier if each.operator in (">=", "==")]
