"""Linear layers and the embedding as nodes, in each precision.

Float weights lie in the graph as in a checkpoint, (out, in), where an embedding may be the LM
head too; ``Transpose`` turns them for ``MatMul``, which a runtime does once, when it loads.
Two operators of ONNX Runtime's own set do the rest: ``MatMulNBits`` multiplies by
block-quantized weights; its ``accuracy_level`` says whether activations stay float (1) or may
be rounded to 8 bits (4), which is faster. ``GatherBlockQuantized`` reads rows of a quantized
embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from phirt.build.checkpoint import Checkpoint
from phirt.build.onnx_graph import GraphBuilder
from phirt.build.onnx_precision import StoredMatrix, encode
from phirt.build.precision import Precision
from phirt.build.quantize import QuantizedMatrix, concatenate_rows
from phirt.build.recipe import Recipe
from phirt.build.repack import fold_offsets, split_bytes

__all__ = ["LinearWriter"]

_FLOAT_ACTIVATIONS = 1
_INT8_ACTIVATIONS = 4


@dataclass(frozen=True, slots=True)
class _SharedTable:
    """An embedding that an LM head tied to it can multiply by as it is stored.

    Attributes:
        node: The embedding's node, after which its weights are named.
        shape: Shape in which MatMulNBits takes its values; None where they are floats.
        has_zero_points: Whether it has zero points, too.
        attributes: MatMulNBits' attributes.
    """

    node: str
    shape: tuple[int, ...] | None = None
    has_zero_points: bool = False
    attributes: Mapping[str, int] = field(default_factory=dict)


class LinearWriter:
    """Writes the layers that hold a decoder's matrices.

    Args:
        graph: Receives nodes and weights.
        checkpoint: The weights.
        recipe: How they are stored.
    """

    def __init__(self, graph: GraphBuilder, checkpoint: Checkpoint, recipe: Recipe) -> None:
        self._graph = graph
        self._checkpoint = checkpoint
        self._recipe = recipe
        self._is_exact = recipe.precision is Precision.EXACT
        self._shared: dict[str, _SharedTable] = {}  # by the embedding's tensor
        self._block_sums: dict[str, str] = {}  # value -> the sums of its blocks
        self._extended: dict[str, str] = {}  # value -> the value and the sums of its blocks

    def project(self, x: str, tensors: Sequence[str], *, name: str) -> str:
        """Multiply by matrices that share an input; their results lie side by side.

        Rows of different matrices do not mix, so that one fused product equals many.

        Args:
            x: The input, (batch, positions, in).
            tensors: Names of matrices (out, in) in the checkpoint.
            name: The node's name; weights are named after it.

        Returns:
            The result, (batch, positions, sum of out).

        Raises:
            UnsupportedModelError: The precision cannot hold one of them.
        """
        matrices = [self._load(tensor) for tensor in tensors]
        if len({_layout(matrix) for matrix in matrices}) == 1:
            return self._multiply(x, _fuse(matrices), name=name)
        parts = [
            self._multiply(x, matrix, name=f"{name}/{index}")
            for index, matrix in enumerate(matrices)
        ]
        return self._graph.node("Concat", parts, name=name, axis=-1)

    def embed(self, token_ids: str, tensor: str, *, name: str) -> str:
        """Read rows of the embedding.

        Args:
            token_ids: Ids, (batch, positions).
            tensor: Name of the matrix (vocabulary, width) in the checkpoint.
            name: The node's name; weights are named after it.

        Returns:
            The rows, (batch, positions, width).

        Raises:
            UnsupportedModelError: The precision cannot hold it.
        """
        weights = self._load(tensor)
        if isinstance(weights, QuantizedMatrix) and (
            weights.offsets is not None  # which gathering does not know
            or self._recipe.float_embedding
        ):
            weights = self._checkpoint.tensor(tensor).float32()
        elif not isinstance(weights, QuantizedMatrix):
            self._shared[tensor] = _SharedTable(name)
        elif not self._must_split(weights):
            self._shared[tensor] = _SharedTable(
                name,
                shape=weights.values.shape,
                has_zero_points=weights.zero_points is not None,
                attributes=self._nbits_attributes(weights),
            )
        if not isinstance(weights, QuantizedMatrix):
            table = self._graph.floats(f"{name}.weight", weights)
            return self._graph.node("Gather", [table, token_ids], name=name, axis=0)
        rows = weights.values.reshape(weights.rows, -1)
        table = self._graph.initializer(f"{name}.quantized", rows)
        inputs = [table, token_ids, self._graph.floats(f"{name}.scales", weights.scales)]
        if weights.zero_points is not None:
            inputs.append(self._graph.initializer(f"{name}.zero_points", weights.zero_points))
        return self._graph.contrib(
            "GatherBlockQuantized",
            inputs,
            name=name,
            bits=weights.bits,
            block_size=weights.block_size,
            gather_axis=0,
            quantize_axis=1,
        )

    def head(self, x: str, tensor: str, *, name: str, output: str) -> None:
        """Multiply by the LM head, which may be the embedding: the two then share bytes.

        Args:
            x: The input, (batch, positions, width).
            tensor: Name of the matrix (vocabulary, width) in the checkpoint.
            name: The node's name.
            output: Name of the result, (batch, positions, vocabulary).
        """
        table = self._shared.get(tensor)
        if table is None:
            self._multiply(x, self._load(tensor), name=name, output=output)
        elif table.shape is None:
            self._matmul(x, f"{table.node}.weight", name=name, output=output)
        else:
            values = self._graph.reshaped(
                f"{name}.quantized", f"{table.node}.quantized", table.shape
            )
            inputs = [x, values, f"{table.node}.scales"]
            if table.has_zero_points:
                inputs.append(f"{table.node}.zero_points")
            self._graph.contrib("MatMulNBits", inputs, [output], name=name, **table.attributes)

    def _must_split(self, weights: QuantizedMatrix) -> bool:
        return weights.bits == 8 and self._is_exact

    def _load(self, tensor: str) -> StoredMatrix:
        return encode(self._checkpoint.tensor(tensor), self._recipe)

    def _multiply(
        self, x: str, weights: StoredMatrix, *, name: str, output: str | None = None
    ) -> str:
        graph = self._graph
        if not isinstance(weights, QuantizedMatrix):
            return self._matmul(
                x, graph.floats(f"{name}.weight", weights), name=name, output=output
            )
        if weights.offsets is not None:
            folded = None if self._is_exact else fold_offsets(weights)
            if folded is not None:
                extended = self._extend_by_block_sums(x, weights)
                return self._multiply(extended, folded, name=name, output=output)
            plain = self._multiply(x, replace(weights, offsets=None), name=f"{name}/blocks")
            offsets = graph.floats(f"{name}.offsets", weights.offsets)
            shift = self._matmul(self._sum_blocks(x, weights), offsets, name=f"{name}/offsets")
            return graph.node("Add", [plain, shift], output and [output], name=name)
        if self._must_split(weights):
            twice = graph.node("Concat", [x, x], name=f"{name}/twice", axis=-1)
            return self._multiply(twice, split_bytes(weights), name=name, output=output)
        inputs = [
            x,
            graph.initializer(f"{name}.quantized", weights.values),
            graph.floats(f"{name}.scales", weights.scales),
        ]
        if weights.zero_points is not None:
            inputs.append(graph.initializer(f"{name}.zero_points", weights.zero_points))
        return graph.contrib(
            "MatMulNBits",
            inputs,
            output and [output],
            name=name,
            **self._nbits_attributes(weights),
        )

    def _matmul(self, x: str, weight: str, *, name: str, output: str | None = None) -> str:
        """``x @ weight.T``, weight (out, in)."""
        turned = self._graph.node("Transpose", [weight], name=f"{name}/turned", perm=[1, 0])
        return self._graph.node("MatMul", [x, turned], output and [output], name=name)

    def _nbits_attributes(self, weights: QuantizedMatrix) -> dict[str, int]:
        return {
            "K": weights.columns,
            "N": weights.rows,
            "bits": weights.bits,
            "block_size": weights.block_size,
            "accuracy_level": _FLOAT_ACTIVATIONS if self._is_exact else _INT8_ACTIVATIONS,
        }

    def _extend_by_block_sums(self, x: str, weights: QuantizedMatrix) -> str:
        """``[x, block_sums(x)]``, once for all that multiply it."""
        if x not in self._extended:
            sums = self._sum_blocks(x, weights)
            self._extended[x] = self._graph.node("Concat", [x, sums], name=f"{x}/extended", axis=-1)
        return self._extended[x]

    def _sum_blocks(self, x: str, weights: QuantizedMatrix) -> str:
        """Sums of ``x`` over the blocks of its last axis, once for all that multiply it."""
        if x not in self._block_sums:
            blocks, size = weights.scales.shape[1], weights.block_size
            graph = self._graph
            split = graph.node(
                "Reshape", [x, graph.constant([0, 0, blocks, size])], name=f"{x}/split"
            )
            self._block_sums[x] = graph.node(
                "ReduceSum", [split, graph.constant([-1])], name=f"{x}/block_sums", keepdims=0
            )
        return self._block_sums[x]


def _layout(weights: StoredMatrix) -> tuple[object, ...]:
    """What matrices must agree in to be fused."""
    if not isinstance(weights, QuantizedMatrix):
        return ("float",)
    return (
        weights.bits,
        weights.block_size,
        weights.zero_points is None,
        weights.offsets is None,
    )


def _fuse(matrices: Sequence[StoredMatrix]) -> StoredMatrix:
    quantized = [matrix for matrix in matrices if isinstance(matrix, QuantizedMatrix)]
    if quantized:
        return concatenate_rows(quantized)
    floats = [matrix for matrix in matrices if not isinstance(matrix, QuantizedMatrix)]
    return floats[0] if len(floats) == 1 else np.concatenate(floats)
