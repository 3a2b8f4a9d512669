"""The rows M8, M10, M11 and M12 of the abuse table, for ONNX files."""

from __future__ import annotations

import os
import random
import tracemalloc

import onnx
import pytest
from onnx import TensorProto, helper

from phirt.errors import ModelError, ModelFormatError, ModelNotFoundError, UnsafeModelError
from phirt.models import onnx_safety
from phirt.models.onnx_safety import check_onnx_files
from tests.models.model_files import WEIGHTS, external_tensor, onnx_model, write_onnx

EMPTY_GRAPH = helper.make_graph([], "g", [], [])


def check(folder, model: onnx.ModelProto) -> None:
    write_onnx(folder, model)
    check_onnx_files(folder, "model.onnx")


def with_attribute(attribute: onnx.AttributeProto) -> onnx.ModelProto:
    model = onnx_model()
    model.graph.node[0].attribute.append(attribute)
    return model


def in_a_subgraph(tensor: TensorProto) -> onnx.ModelProto:
    inner = helper.make_graph([], "inner", [], [], initializer=[tensor])
    middle = helper.make_graph([helper.make_node("If", ["c"], [], then_branch=inner)], "m", [], [])
    return with_attribute(helper.make_attribute("then_branch", middle))


def in_a_list_of_subgraphs(tensor: TensorProto) -> onnx.ModelProto:
    inner = helper.make_graph([], "inner", [], [], initializer=[tensor])
    return with_attribute(helper.make_attribute("branches", [EMPTY_GRAPH, inner]))


def in_an_attribute(tensor: TensorProto) -> onnx.ModelProto:
    return with_attribute(helper.make_attribute("value", tensor))


def in_a_list_of_attributes(tensor: TensorProto) -> onnx.ModelProto:
    return with_attribute(helper.make_attribute("values", [tensor, tensor]))


def in_a_function(tensor: TensorProto) -> onnx.ModelProto:
    model = onnx_model()
    node = helper.make_node("Constant", [], ["y"], value=tensor)
    model.functions.append(
        helper.make_function("local", "F", [], ["y"], [node], [helper.make_opsetid("", 22)])
    )
    return model


def in_a_functions_default(tensor: TensorProto) -> onnx.ModelProto:
    model = in_a_function(external_tensor())
    model.functions[0].attribute_proto.append(helper.make_attribute("value", tensor))
    return model


def in_training_information(tensor: TensorProto) -> onnx.ModelProto:
    model = onnx_model()
    model.training_info.add().initialization.initializer.append(tensor)
    return model


def in_a_training_algorithm(tensor: TensorProto) -> onnx.ModelProto:
    model = onnx_model()
    model.training_info.add().algorithm.initializer.append(tensor)
    return model


def in_a_sparse_initializer(tensor: TensorProto) -> onnx.ModelProto:
    model = onnx_model()
    model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    return model


def in_sparse_indices(tensor: TensorProto) -> onnx.ModelProto:
    model = onnx_model()
    model.graph.sparse_initializer.add().indices.CopyFrom(tensor)
    return model


def in_a_sparse_attribute(tensor: TensorProto) -> onnx.ModelProto:
    sparse = onnx.SparseTensorProto()
    sparse.values.CopyFrom(tensor)
    return with_attribute(helper.make_attribute("sparse_value", sparse))


PLACES = [
    onnx_model,
    in_a_subgraph,
    in_a_list_of_subgraphs,
    in_an_attribute,
    in_a_list_of_attributes,
    in_a_function,
    in_a_functions_default,
    in_training_information,
    in_a_training_algorithm,
    in_a_sparse_initializer,
    in_sparse_indices,
    in_a_sparse_attribute,
]
places = pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)


@places
def test_a_sound_tensor_passes_wherever_it_stands(folder, place):
    check(folder, place(external_tensor()))


@places
def test_m10_no_tensor_leads_out_of_the_folder_wherever_it_stands(folder, place):
    (folder.parent / "secret").write_bytes(WEIGHTS.tobytes())
    with pytest.raises(UnsafeModelError):
        check(folder, place(external_tensor(location="../secret")))


@places
def test_m12_no_tensor_is_too_large_wherever_it_stands(folder, place):
    tensor = TensorProto(name="t", dims=[10**12], data_type=TensorProto.FLOAT, raw_data=b"1234")
    with pytest.raises(ModelFormatError, match="1000000000000"):
        check(folder, place(tensor))


@pytest.mark.parametrize(
    "location",
    [
        "../secret",
        "x/../../secret",
        "/etc/passwd",
        "C:\\Windows\\win.ini",
        "C:secret",
        "\\\\host\\share\\x",
        "//host/share/x",
        "..\\secret",
        "x\0y",
        "",
        ".",
        "NUL",
        "model.onnx.data:stream",
        "*/_ORT_MEM_ADDR_/*",
    ],
)
def test_m10_locations_outside_the_folder_are_refused(folder, location):
    with pytest.raises(UnsafeModelError, match="inside its own folder"):
        check(folder, onnx_model(external_tensor(location=location)))


def test_m10_a_location_counts_even_where_the_tensor_says_that_it_is_embedded(folder):
    tensor = external_tensor(location="../secret")
    tensor.data_location = TensorProto.DEFAULT
    with pytest.raises(UnsafeModelError):
        check(folder, onnx_model(tensor))


def test_m10_of_two_locations_both_count(folder):
    tensor = external_tensor()
    tensor.external_data.add(key="location", value="../secret")
    with pytest.raises(UnsafeModelError):
        check(folder, onnx_model(tensor))


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "unrelated.txt"])
def test_m10_links_out_of_the_folder_are_refused(folder, tmp_path, link, name):
    (folder / "unrelated.txt").write_text("x")
    (folder / name).rename(tmp_path / "outside")
    link(folder / name, tmp_path / "outside")
    with pytest.raises(UnsafeModelError, match="leads out of the model folder"):
        check_onnx_files(folder, "model.onnx")


def test_m10_the_blobs_of_the_same_cached_repository_are_taken(folder, tmp_path, link):
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (folder / name).rename(repository / "blobs" / name.replace(".", "0"))
        link(snapshot / name, repository / "blobs" / name.replace(".", "0"))
    check_onnx_files(snapshot, "model.onnx")


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize(
    "value",
    ["-1", str(1 << 50), str(1 << 63), str(1 << 64), "9" * 40, "0x10", "1e3", " 1", "", "٣"],
)
def test_m11_offsets_and_lengths_outside_the_file_are_refused(folder, key, value):
    tracemalloc.start()
    try:
        with pytest.raises(ModelFormatError, match="weight"):
            check(folder, onnx_model(external_tensor(**{key: value})))
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_m11_the_end_of_the_file_counts(folder):
    check(folder, onnx_model(external_tensor(offset="0")))
    with pytest.raises(ModelFormatError, match=r"bytes 1 to 97 of model\.onnx\.data, which has 96"):
        check(folder, onnx_model(external_tensor(offset="1")))


@pytest.mark.parametrize(
    "dims", [[10**12], [10**12, 10**12], [1 << 62, 4], [-4, -6], [4, -6], [4, 7], [4], []]
)
def test_m12_shapes_that_do_not_fit_their_bytes_are_refused(folder, dims):
    tensor = external_tensor()
    del tensor.dims[:]
    tensor.dims.extend(dims)
    with pytest.raises(ModelFormatError, match="weight"):
        check(folder, onnx_model(tensor))


@pytest.mark.parametrize(
    "tensor",
    [
        TensorProto(dims=[3], data_type=TensorProto.FLOAT, raw_data=b"1234"),
        TensorProto(dims=[10**12], data_type=TensorProto.FLOAT, float_data=[1.0]),
        TensorProto(dims=[10**12], data_type=TensorProto.INT64, int64_data=[1]),
        TensorProto(dims=[10**12], data_type=TensorProto.FLOAT),
        TensorProto(dims=[10**12], data_type=TensorProto.STRING, string_data=[b"x"]),
        TensorProto(dims=[1], data_type=99, raw_data=b"1"),
        TensorProto(dims=[1] * 1000, data_type=TensorProto.FLOAT, raw_data=b"1234"),
    ],
)
def test_m12_embedded_tensors_hold_what_their_shape_says(folder, tensor):
    with pytest.raises(ModelFormatError):
        check(folder, onnx_model(external_tensor(), tensor))


@pytest.mark.parametrize(
    "tensor",
    [
        helper.make_tensor("t", TensorProto.FLOAT, [2, 3], [0.5] * 6),
        helper.make_tensor("t", TensorProto.FLOAT, [], [1.0]),
        helper.make_tensor("t", TensorProto.INT64, [0], []),
        helper.make_tensor("t", TensorProto.INT64, [2], [-1, 1 << 40]),
        helper.make_tensor("t", TensorProto.FLOAT16, [2], [1.0, 2.0]),
        helper.make_tensor("t", TensorProto.BFLOAT16, [2], [1.0, 2.0]),
        helper.make_tensor("t", TensorProto.INT4, [3], [1, -2, 3]),
        helper.make_tensor("t", TensorProto.UINT4, [5], bytes(3), raw=True),
        helper.make_tensor("t", TensorProto.COMPLEX64, [1], [1 + 2j]),
        helper.make_tensor("t", TensorProto.DOUBLE, [2], [1.0, 2.0]),
        helper.make_tensor("t", TensorProto.UINT64, [1], [1 << 63]),
        helper.make_tensor("t", TensorProto.STRING, [2], [b"a", b"b"]),
        helper.make_tensor("t", TensorProto.BOOL, [2], [True, False]),
    ],
    ids=lambda tensor: f"{TensorProto.DataType.Name(tensor.data_type)}{list(tensor.dims)}",
)
def test_embedded_tensors_of_every_encoding_pass(folder, tensor):
    check(folder, onnx_model(external_tensor(), tensor))


@pytest.mark.parametrize("dims", [[10**12], [1 << 20, 1 << 20], [-1]])
def test_m12_sparse_tensors_that_unpack_beyond_the_budget_are_refused(folder, dims):
    model = onnx_model()
    model.graph.sparse_initializer.add(dims=dims).values.CopyFrom(external_tensor())
    with pytest.raises(ModelFormatError, match="sparse tensor of the shape"):
        check(folder, model)


def test_m12_one_region_claimed_many_times_is_refused(folder):
    tensors = [external_tensor(f"w{index}") for index in range(1000)]
    with pytest.raises(ModelFormatError, match="claims 96,000 bytes of weights from files"):
        check(folder, onnx_model(*tensors))


def test_tied_weights_may_share_a_region(folder):
    check(folder, onnx_model(external_tensor("embedding"), external_tensor("head")))


def test_a_missing_weights_file_is_named(folder):
    with pytest.raises(ModelNotFoundError, match=r"'other\.data', which is not in its folder"):
        check(folder, onnx_model(external_tensor(location="other.data")))


def test_m8_a_graph_truncated_at_every_byte_is_a_typed_error(folder):
    whole = in_a_subgraph(external_tensor()).SerializeToString()
    write_onnx(folder, onnx_model())
    for length in range(len(whole)):
        (folder / "model.onnx").write_bytes(whole[:length])
        with pytest.raises(ModelFormatError):
            check_onnx_files(folder, "model.onnx")
    (folder / "model.onnx").write_bytes(whole)
    check_onnx_files(folder, "model.onnx")


def test_m9_flipped_bits_pass_or_are_a_typed_error(folder):
    whole = in_a_subgraph(external_tensor()).SerializeToString()
    write_onnx(folder, onnx_model())
    choose = random.Random(0)  # noqa: S311 - a fixed sequence of faults
    refused = 0
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(choose.randint(1, 4)):
            damaged[choose.randrange(len(whole))] ^= 1 << choose.randrange(8)
        (folder / "model.onnx").write_bytes(damaged)
        try:
            check_onnx_files(folder, "model.onnx")
        except ModelError:
            refused += 1
    assert refused > 250


def test_a_graph_in_several_parts_is_refused(folder):
    # Protobuf merges them, so that a tensor could be spread over two harmless halves.
    model = onnx_model()
    second = onnx.ModelProto(graph=EMPTY_GRAPH)
    write_onnx(folder, model)
    (folder / "model.onnx").write_bytes(model.SerializeToString() + second.SerializeToString())
    with pytest.raises(ModelFormatError, match="graph in several parts"):
        check_onnx_files(folder, "model.onnx")


def wire(number: int, content: bytes) -> bytes:
    """A length-delimited field; onnx itself refuses to build what the next test needs."""
    size, length = len(content), b""
    while size >= 0x80:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def test_graphs_nested_without_end_are_refused(folder):
    graph = b""
    for _ in range(1000):
        graph = wire(1, wire(5, wire(6, graph)))  # graph.node.attribute.g
    model = onnx.ModelProto(ir_version=10, opset_import=[helper.make_opsetid("", 22)])
    write_onnx(folder, onnx_model())
    (folder / "model.onnx").write_bytes(model.SerializeToString() + wire(7, graph))
    with pytest.raises(ModelFormatError, match="nested more than"):
        check_onnx_files(folder, "model.onnx")


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"GGUF" + bytes(100), b"\xff" * 100])
def test_what_is_not_onnx_is_a_typed_error(folder, content):
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(ModelFormatError):
        check_onnx_files(folder, "model.onnx")


class TestAgain:
    """A graph that has passed is not walked again, but what it names is looked at."""

    @pytest.fixture
    def passed(self, folder, monkeypatch):
        check(folder, onnx_model(external_tensor()))

        def refuse(_):
            raise AssertionError("it was walked again")

        monkeypatch.setattr(onnx_safety._Checker, "_tensors", refuse)
        check_onnx_files(folder, "model.onnx")
        return folder

    def test_weights_that_are_gone(self, passed):
        (passed / "model.onnx.data").unlink()
        with pytest.raises(ModelNotFoundError, match="is not in its folder"):
            check_onnx_files(passed, "model.onnx")

    def test_weights_of_another_size(self, passed):
        (passed / "model.onnx.data").write_bytes(b"short")
        with pytest.raises(AssertionError, match="walked again"):
            check_onnx_files(passed, "model.onnx")

    def test_weights_that_became_a_link_out_of_the_folder(self, passed, tmp_path):
        outside = tmp_path / "outside"
        outside.write_bytes((passed / "model.onnx.data").read_bytes())
        (passed / "model.onnx.data").unlink()
        (passed / "model.onnx.data").symlink_to(outside)
        with pytest.raises(UnsafeModelError):
            check_onnx_files(passed, "model.onnx")

    def test_another_graph_of_the_same_size_and_time(self, passed):
        path = passed / "model.onnx"
        before, content = path.stat(), bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(AssertionError, match="walked again"):
            check_onnx_files(passed, "model.onnx")

    def test_the_same_graph_in_another_folder(self, passed, tmp_path):
        other = tmp_path / "other"
        other.mkdir()
        (other / "model.onnx").write_bytes((passed / "model.onnx").read_bytes())
        with pytest.raises(ModelNotFoundError, match="is not in its folder"):
            check_onnx_files(other, "model.onnx")


def test_a_missing_graph_is_not_found(folder):
    (folder / "model.onnx").unlink()
    with pytest.raises(ModelNotFoundError, match=r"model\.onnx"):
        check_onnx_files(folder, "model.onnx")


def test_a_graph_beyond_protobufs_limit_is_refused(folder):
    with (folder / "model.onnx").open("r+b") as file:
        file.truncate(1 << 31)  # sparse
    with pytest.raises(ModelFormatError, match="2 GiB"):
        check_onnx_files(folder, "model.onnx")
