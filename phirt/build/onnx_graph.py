"""A small builder of ONNX graphs: nodes by operator, weights into external data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from phirt.build.onnx_external import ExternalData
from phirt.errors import UnsupportedModelError
from phirt.types import FloatArray

__all__ = ["GraphBuilder"]

_IR_VERSION = 10
_OPSET = 21  # The newest that ONNX Runtime 1.20 knows; nothing newer is used.
_CONTRIB = "com.microsoft"
_INLINE_LIMIT = 1024  # Bytes; shapes and axes stay in the model file, where inference sees them.

_Dimension: TypeAlias = int | str


class GraphBuilder:
    """Collects nodes, initializers, inputs and outputs, then makes one model of them.

    Args:
        name: The graph's name.
        external: Receives the bytes of every initializer that is not tiny.
        float_type: What the graph computes in.

    Attributes:
        float_type: What the graph computes in.
    """

    def __init__(
        self,
        name: str,
        external: ExternalData,
        float_type: type[np.float32] | type[np.float16] = np.float32,
    ) -> None:
        self._name = name
        self._external = external
        self.float_type = float_type
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: type[np.generic], shape: Sequence[_Dimension]) -> str:
        """Declare a graph input and return its name."""
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: type[np.generic], shape: Sequence[_Dimension]) -> None:
        """Declare a graph output."""
        self._outputs.append(_value_info(name, dtype, shape))

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | None = None,
        *,
        name: str,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Append a node.

        Args:
            op_type: Operator.
            inputs: Names of values; the empty string leaves an optional one out.
            outputs: Names of the results; None for one, named after the node.
            name: The node's name, unique in the graph.
            domain: The operator set; by default the standard one.
            **attributes: Attributes of the operator.

        Returns:
            The name of the first result.
        """
        results = [f"{name}/output"] if outputs is None else list(outputs)
        self._nodes.append(
            helper.make_node(op_type, inputs, results, name=name, domain=domain, **attributes)
        )
        return results[0]

    def contrib(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | None = None,
        *,
        name: str,
        **attributes: Any,
    ) -> str:
        """Append a node of ONNX Runtime's own operator set; otherwise as `node`."""
        return self.node(op_type, inputs, outputs, name=name, domain=_CONTRIB, **attributes)

    def initializer(self, name: str, array: NDArray[Any]) -> str:
        """Add a constant under a name, once, and return the name."""
        if array.nbytes <= _INLINE_LIMIT:
            self._add_initializer(numpy_helper.from_array(array, name))
        else:
            self._add_initializer(self._write(name, array))
        return name

    def floats(self, name: str, array: FloatArray) -> str:
        """Add a constant, as `initializer` does, in what the graph computes in.

        Raises:
            UnsupportedModelError: A value is beyond the largest of that type.
        """
        with np.errstate(over="ignore"):
            converted = array.astype(self.float_type, copy=False)
        if self.float_type is np.float16 and not np.isfinite(converted).all():
            raise UnsupportedModelError(
                f"{name} holds {float(np.abs(array).max()):,.0f}, beyond the largest number of "
                "float16, in which the graph was to compute. Use precision='fp32', or 'int8' or "
                "'int4' for device 'cpu'."
            )
        return self.initializer(name, converted)

    def _write(self, name: str, array: NDArray[Any]) -> onnx.TensorProto:
        extent = self._external.append(array)
        tensor = onnx.TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (
            ("location", self._external.location),
            ("offset", str(extent.offset)),
            ("length", str(extent.length)),
        ):
            tensor.external_data.add(key=key, value=value)
        return tensor

    def reshaped(self, name: str, source: str, shape: Sequence[int]) -> str:
        """Add a constant that shares another's bytes, in another shape.

        An embedding and the LM head tied to it are one region of the file.
        """
        tensor = onnx.TensorProto()
        tensor.CopyFrom(self._initializers[source])
        tensor.name = name
        tensor.dims[:] = shape
        self._add_initializer(tensor)
        return name

    def constant(self, values: int | Sequence[int]) -> str:
        """A small int64 constant, made once: a scalar for an int, else a vector."""
        name = f"constants/{values if isinstance(values, int) else list(values)}"
        if name not in self._initializers:
            self.initializer(name, np.array(values, np.int64))
        return name

    def _add_initializer(self, tensor: onnx.TensorProto) -> None:
        if tensor.name in self._initializers:
            raise ValueError(f"The graph has an initializer {tensor.name!r} already.")
        self._initializers[tensor.name] = tensor

    def save(self, path: Path, *, producer: str, producer_version: str) -> None:
        """Write the model file; the weights lie beside it already.

        Args:
            path: The file to create; it must not exist.
            producer: What made the model.
            producer_version: Its version.
        """
        graph = helper.make_graph(
            self._nodes,
            self._name,
            self._inputs,
            self._outputs,
            initializer=list(self._initializers.values()),
        )
        model = helper.make_model(
            graph,
            ir_version=_IR_VERSION,
            opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid(_CONTRIB, 1)],
            producer_name=producer,
            producer_version=producer_version,
        )
        with path.open("xb") as file:
            file.write(model.SerializeToString())


def _value_info(
    name: str, dtype: type[np.generic], shape: Sequence[_Dimension]
) -> onnx.ValueInfoProto:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, element, list(shape))
