"""Headers that lie, by name, with what the error must say."""

from __future__ import annotations

import struct

from tests.build.gguf.raw import (
    ARRAY,
    BOOL,
    F32,
    Q4_0,
    STRING,
    UINT32,
    UINT64,
    Raw,
    array,
    pair,
    string,
    tensor,
)

HUGE = 2**63
ONE = struct.pack("<I", 1)


def _alignment(value: int) -> Raw:
    return Raw(pairs=[pair(b"general.alignment", UINT32, struct.pack("<I", value))])


HOSTILE: dict[str, tuple[Raw, str]] = {
    "tensor count of 2**63": (Raw(tensor_count=HUGE), "number of tensors is 9,223"),
    "key count of 2**63": (Raw(pair_count=HUGE), "number of keys is 9,223"),
    "more keys than bytes": (Raw(pair_count=100), "number of keys is 100, and at most 0"),
    "key of 2**63 bytes": (
        Raw(pairs=[string(b"key", HUGE) + bytes(40)]),
        "key 1 of 1 is 9,223,372,036,854,775,808 bytes long",
    ),
    "key of 2 kB": (Raw(pairs=[pair(b"k" * 2048, UINT32, ONE)]), "longer than 1,024 bytes"),
    "key that is not UTF-8": (Raw(pairs=[pair(b"\xff", UINT32, ONE)]), "not UTF-8"),
    "key twice": (Raw(pairs=[pair(b"key", UINT32, ONE)] * 2), "'key' occurs twice"),
    "value of unknown type": (Raw(pairs=[pair(b"key", 13, ONE)]), "has type 13"),
    "boolean of 2": (Raw(pairs=[pair(b"key", BOOL, b"\x02")]), "a boolean of 2"),
    "string of 2**63 bytes": (
        Raw(pairs=[pair(b"key", STRING, struct.pack("<Q", HUGE))]),
        "value of 'key' is 9,223",
    ),
    "string array of 2**40": (
        Raw(pairs=[pair(b"key", ARRAY, array(STRING, 2**40, bytes(64)))]),
        "length of the value of 'key' is 1,099,511,627,776",
    ),
    "number array of 2**40": (
        Raw(pairs=[pair(b"key", ARRAY, array(UINT32, 2**40, bytes(64)))]),
        "length of the value of 'key' is 1,099,511,627,776",
    ),
    "number array of 2**61, whose bytes wrap": (
        Raw(pairs=[pair(b"key", ARRAY, array(UINT64, 2**61, bytes(64)))]),
        "length of the value of 'key' is 2,305,843,009,213,693,952",
    ),
    "string of 2**63 bytes in an array": (
        Raw(pairs=[pair(b"key", ARRAY, array(STRING, 2, string(b"") + string(b"", HUGE)))]),
        "string 2 of the value of 'key' would end at byte 9,223",
    ),
    "string whose end wraps to its start": (
        Raw(pairs=[pair(b"key", ARRAY, array(STRING, 2, string(b"", 2**64 - 8) * 2))]),
        "string 1 of the value of 'key' would end at byte 18,446",
    ),
    "arrays of arrays": (
        Raw(pairs=[pair(b"key", ARRAY, array(ARRAY, 1, array(UINT32, 1, ONE)))]),
        "array of arrays",
    ),
    "alignment 0": (_alignment(0), "general.alignment is 0"),
    "alignment 24": (_alignment(24), "general.alignment is 24"),
    "alignment that is a string": (
        Raw(pairs=[pair(b"general.alignment", STRING, string(b"32"))]),
        "general.alignment is b'32'",
    ),
    "tensor name of 2**63 bytes": (
        Raw(tensors=[string(b"t", HUGE) + bytes(40)]),
        "name of tensor 1 of 1 is 9,223",
    ),
    "tensor name that is not UTF-8": (Raw(tensors=[tensor(b"\xff", [1])]), "not UTF-8"),
    "tensor twice": (
        Raw(tensors=[tensor(b"t", [1]), tensor(b"t", [1], offset=32)], data=bytes(64)),
        "'t' occurs twice",
    ),
    "rank 0": (Raw(tensors=[tensor(b"t", [], rank=0) + bytes(8)]), "0 dimensions"),
    "rank 2**32 - 1": (Raw(tensors=[tensor(b"t", [1], rank=2**32 - 1)]), "4,294,967,295 dim"),
    "dimension 0": (Raw(tensors=[tensor(b"t", [0])]), r"shape \(0,\)"),
    "dimension of 10**12": (Raw(tensors=[tensor(b"t", [10**12])]), "past the end of the file"),
    "dimensions that wrap 2**64": (
        Raw(tensors=[tensor(b"t", [2**33, 2**33])], data=bytes(64)),
        "past the end of the file",
    ),
    "dimensions whose bytes wrap 2**64": (
        Raw(tensors=[tensor(b"t", [2**62, 1])], data=bytes(64)),
        "past the end of the file",
    ),
    "divisors of LongRoPE, 2**62 of them": (
        Raw(tensors=[tensor(b"rope_factors_long.weight", [2**62])], data=bytes(64)),
        "past the end of the file",
    ),
    "rows that are not whole blocks": (
        Raw(tensors=[tensor(b"t", [33], encoding=Q4_0)], data=bytes(64)),
        "do not divide into blocks of 32",
    ),
    "offset past the end": (
        Raw(tensors=[tensor(b"t", [8], encoding=F32, offset=2**20)], data=bytes(32)),
        "past the end of the file",
    ),
    "offset that wraps 2**64": (
        Raw(tensors=[tensor(b"t", [8], offset=2**64 - 32)], data=bytes(32)),
        "past the end of the file",
    ),
    "offset off the alignment": (
        Raw(tensors=[tensor(b"t", [1], offset=4)], data=bytes(32)),
        "not a multiple of 32",
    ),
    "tensors that overlap": (
        Raw(tensors=[tensor(b"a", [16]), tensor(b"b", [8], offset=32)], data=bytes(64)),
        "'b' overlaps tensor 'a'",
    ),
    "tensors at the same place": (
        Raw(tensors=[tensor(b"a", [8]), tensor(b"b", [8])], data=bytes(64)),
        "overlaps",
    ),
}
