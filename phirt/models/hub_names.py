"""Names of models on a Hugging Face hub: ``org/name[@revision][:subfolder-or-file]``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from phirt.models.paths import plain_name_fault

__all__ = ["HubName", "path_fault"]

# What the hub lets a repository be called. Neither "--", which its cache puts between the
# two parts, nor ".git", which it drops.
_PART = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
# What git lets a branch or tag be called, less what a path or an address gives a meaning.
_REVISION = re.compile(
    r"(?!.*(?:\.\.|//|/\.|\./|\.lock(?:/|\Z)))[A-Za-z0-9_][A-Za-z0-9._/+-]{0,199}"
)
_FORM = "org/name, org/name@revision or org/name@revision:subfolder-or-file"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubName:
    """A model on a hub, or a part of one.

    Attributes:
        repo: The repository, ``"org/name"``.
        revision: A branch, a tag or a commit; None is the hub's default branch.
        path: A file or folder in it, with ``/``; None is all of it.

    Raises:
        ValueError: A part is not one that every file system can hold, or leads elsewhere.
    """

    repo: str
    revision: str | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        fault = (
            _repo_fault(self.repo)
            or (self.revision is not None and _revision_fault(self.revision))
            or (self.path is not None and path_fault(self.path))
        )
        if fault:
            shown = ascii(str(self))[:200]
            raise ValueError(f"{shown} does not name a model on a hub: {fault}. Write {_FORM}.")

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read a name as a user writes it.

        Args:
            name: ``org/name``, and optionally ``@revision`` and ``:subfolder-or-file``.

        Raises:
            ValueError: It is not one.
        """
        head, colon, path = name.partition(":")
        repo, at, revision = head.partition("@")
        return cls(
            repo=repo,
            revision=revision if at else None,
            path=path.removesuffix("/") if colon else None,
        )

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        path = "" if self.path is None else f":{self.path}"
        return f"{self.repo}{revision}{path}"


def path_fault(path: str) -> str | None:
    """Why a path in a repository cannot be a path below a folder on every system, or None.

    Args:
        path: With ``/``, as a user or a hub gave it.
    """
    fault = next((fault for part in path.split("/") if (fault := plain_name_fault(part))), None)
    return f"a part of {ascii(path)[:100]} is refused, since {fault}" if fault else None


def _repo_fault(repo: str) -> str | None:
    parts = repo.split("/")
    if len(parts) != 2:
        return "it must have one '/', between organisation and name"
    if repo.endswith(".git") or not all(_PART.fullmatch(part) for part in parts):
        return "organisation and name are letters, digits, '-', '_' and '.'"
    return plain_name_fault(parts[0]) or plain_name_fault(parts[1])


def _revision_fault(revision: str) -> str | None:
    if not _REVISION.fullmatch(revision) or revision.endswith(("/", ".")):
        return f"{ascii(revision)[:100]} is not the name of a branch, a tag or a commit"
    return None
