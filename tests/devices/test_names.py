import pytest

from phirt.devices.names import DeviceName


@pytest.mark.parametrize(
    ("text", "kind", "index"),
    [("cpu", "cpu", None), ("cuda:1", "cuda", 1), (" CUDA:0 ", "cuda", 0), ("auto", "auto", None)],
)
def test_names(text, kind, index):
    assert DeviceName.parse(text) == DeviceName(kind, index)


@pytest.mark.parametrize("name", [DeviceName("cpu"), DeviceName("cuda", 3)])
def test_a_name_reads_back(name):
    assert DeviceName.parse(str(name)) == name


@pytest.mark.parametrize(
    "text", ["", "cuda:", "cuda:x", ":0", "cuda:1:2", "a b", "cuda:-1", "0", "auto:1"]
)
def test_malformed_names(text):
    with pytest.raises(ValueError, match="not a device name"):
        DeviceName.parse(text)


def test_not_a_string():
    with pytest.raises(TypeError, match="int"):
        DeviceName.parse(0)  # type: ignore[arg-type] # on purpose
