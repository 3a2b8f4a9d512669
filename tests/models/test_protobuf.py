from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phirt.models.protobuf import WireError, bytes_of, fields, packed_varints, signed


def varint(value: int) -> bytes:
    head = []
    while value >= 0x80:
        head.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*head, value])


unsigned64 = st.integers(0, (1 << 64) - 1)
numbers = st.integers(1, (1 << 29) - 1)


@given(st.lists(st.tuples(numbers, unsigned64 | st.binary(max_size=300))))
def test_fields_are_read_back(written):
    data = b"".join(
        varint(number << 3) + varint(value)
        if isinstance(value, int)
        else varint(number << 3 | 2) + varint(len(value)) + value
        for number, value in written
    )
    read = [
        (item.number, item.value if item.wire == 0 else bytes_of(data, item))
        for item in fields(data, 0, len(data))
    ]
    assert read == written


@given(st.binary(max_size=200))
def test_any_bytes_are_fields_within_bounds_or_a_wire_error(data):
    end = 0
    with contextlib.suppress(WireError):
        for item in fields(data, 0, len(data)):
            assert end <= item.start <= item.end <= len(data)
            end = item.end


def test_fixed_fields_have_their_width():
    data = bytes([1 << 3 | 1]) + bytes(8) + bytes([2 << 3 | 5]) + bytes(4)
    assert [(item.number, item.end - item.start) for item in fields(data, 0, len(data))] == [
        (1, 8),
        (2, 4),
    ]


@pytest.mark.parametrize(
    "data",
    [
        bytes([0, 0]),  # field number 0
        bytes([1 << 3 | 3]),  # a group
        bytes([1 << 3 | 7, 0]),  # no such wire type
        bytes([1 << 3]),  # ends before the value
        bytes([1 << 3, 0x80]),  # ends inside the value
        bytes([1 << 3, *[0x80] * 10, 0]),  # eleven bytes
        bytes([1 << 3 | 2, 5, 1]),  # longer than what is left
        bytes([1 << 3 | 1, 0]),  # eight bytes announced
        bytes([1 << 3 | 2]) + varint((1 << 64) - 1),
    ],
)
def test_malformed_messages(data):
    with pytest.raises(WireError):
        list(fields(data, 0, len(data)))


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1)))
def test_packed_signed_integers(values):
    content = b"".join(varint(value % (1 << 64)) for value in values)
    data = bytes([1 << 3 | 2]) + varint(len(content)) + content
    (item,) = fields(data, 0, len(data))
    assert [signed(value) for value in packed_varints(data, item)] == values
