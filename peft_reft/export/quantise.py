"""Weights of few bits: an ONNX backbone whose matrices are rounded, and whose edits are not.

The backbone's weights are constants of the graph and are found as such; the edits are inputs and stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

INTEGERS = {"int8": 8, "int4": 4}  # bits
BLOCK = 32  # weights that share a scale and a zero
ONE_FILE = 1_500_000_000  # bytes of weights up to which an ONNX file holds them itself; protobuf ends at 2 GiB
ROUND_INPUTS = 4  # onnxruntime's accuracy_level: what is multiplied with rounded weights is rounded to 8 bits as well


def quantise(source: Path, target: Path, dtype: str) -> None:
    """An ONNX backbone with weights of 8 or 4 bits.

    Blocks of 32 weights share a scale and a zero. On a CPU, onnxruntime rounds what is multiplied with them to 8 bits
    on the way, in blocks of 32 too: that is 2.5 times as fast as without, and SmolLM2-135M answers alike. (One scale
    for a whole matrix, as its `quantize_dynamic` has it, made nonsense of that model.) Hidden states, attention, the
    cache and the products of the edits stay in float32.

    Args:
        source, target: ONNX files.
        dtype: "int8", or "int4", which rounds the embeddings as well. Matrices of 4 bits are ONNX's own
            DequantizeLinear in front of a MatMul, which a runtime that has no fast product of rounded weights can work
            out once, when it loads the file; onnxruntime's tools make the others products of its own (MatMulNBits).
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
    from onnxruntime.quantization.quant_utils import QuantFormat

    rounded = with_transposed_weights(onnx.load(source))
    own = [("MatMul", QuantFormat.QOperator)]
    for operator, form in own if dtype == "int8" else [("Gather", QuantFormat.QOperator), ("MatMul", QuantFormat.QDQ)]:
        config = DefaultWeightOnlyQuantConfig(
            block_size=BLOCK,
            bits=INTEGERS[dtype],
            is_symmetric=False,
            accuracy_level=ROUND_INPUTS,
            quant_format=form,
            op_types_to_quantize=(operator,),
        )
        quantiser = MatMulNBitsQuantizer(rounded, algo_config=config)
        quantiser.process()
        rounded = quantiser.model.model
    size = sum(len(tensor.raw_data) for tensor in rounded.graph.initializer)
    onnx.save(rounded, target, save_as_external_data=size > ONE_FILE, location=f"{target.name}.data")


def with_transposed_weights(model: Any) -> Any:
    """An ONNX model whose matrices are stored as they are multiplied with; quantisers look at constants alone.

    An output layer that shares its weights with the embedding is the transpose of these when the graph runs.
    """
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in stored]:
        order = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), None)
        values = numpy_helper.to_array(stored[node.input[0]]).transpose(order)
        model.graph.initializer.append(numpy_helper.from_array(values.copy(), node.output[0]))
        model.graph.node.remove(node)
    used = {name for node in model.graph.node for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)
    return model
