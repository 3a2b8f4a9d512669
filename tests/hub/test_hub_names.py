"""Names of models on a hub, and row S1: names that lead elsewhere."""

from __future__ import annotations

import pytest

from phirt.models.hub_names import HubName


@pytest.mark.parametrize(
    ("text", "repo", "revision", "path"),
    [
        ("org/name", "org/name", None, None),
        ("Org-1/Na_me.v2", "Org-1/Na_me.v2", None, None),
        ("org/name@main", "org/name", "main", None),
        ("org/name@refs/pr/12", "org/name", "refs/pr/12", None),
        ("org/name:onnx/cpu", "org/name", None, "onnx/cpu"),
        ("org/name:onnx/cpu/", "org/name", None, "onnx/cpu"),
        ("org/name@v1.0:model-q4.gguf", "org/name", "v1.0", "model-q4.gguf"),
        ("org/name:mail@home.gguf", "org/name", None, "mail@home.gguf"),
    ],
)
def test_names_are_taken_apart(text, repo, revision, path):
    assert HubName.parse(text) == HubName(repo=repo, revision=revision, path=path)


@pytest.mark.parametrize("text", ["org/name", "org/name@v1", "org/name:a/b", "org/name@v1:a/b"])
def test_names_are_put_together_again(text):
    assert str(HubName.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "a/b/c",
        "/b",
        "a/",
        "a b/c",
        "a/b.git",
        "a/b--c",
        "a/b@",
        "a/b@one two",
        "a/b@x..y",
        "a/b@x/",
        "a/b@-x",
        "a/b:",
        "ä/b",
        f"a/{'b' * 97}",
        # S1
        "../b",
        "a/..",
        "./b",
        "~/b",
        "C:/b",
        "C:\\b",
        "//server/share",
        "\\\\server\\share",
        "a\\b/c",
        "a/b\0",
        "a/b\n",
        "a/con",
        "NUL/b",
        "a/b@../../c",
        "a/b@/c",
        "a/b@x\0",
        "a/b@main\n",
        "a/b:../c",
        "a/b:c/../../d",
        "a/b:/etc/passwd",
        "a/b:C:/c",
        "a/b:c\\d",
        "a/b:c\0",
        "a/b:c\n",
        "a/b:aux.gguf",
        "a/b:c.",
        "a/b:c//d",
        "a/b:\ud800",
    ],
)
def test_s1_what_is_no_name_is_refused(text):
    with pytest.raises(ValueError, match=r"does not name a model on a hub: .* Write org/name"):
        HubName.parse(text)
