"""Backbones as files: traced once with dynamic shapes, then written as ONNX, PT2 or for ExecuTorch, and opened again.

Each format is a `Format`: how it is written, and how a file of it is run from Python, with the same arguments in the
same order (`answers.Run`). Quantisation is done on the ONNX graph: it finds the backbone's weights, which are
constants, and leaves the edits alone, which are inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from peft_reft.export.answers import Run
from peft_reft.export.backbone import Backbone, BakedBackbone
from peft_reft.export.files import BackboneDescription, describe
from peft_reft.tuner.staging import staged

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INTEGERS = ("int8", "int4")
ONE_FILE = 1_500_000_000  # bytes of weights up to which an ONNX file holds them itself; protobuf ends at 2 GiB
BLOCK = 32  # quantised weights that share a scale


def trace(
    backbone: Backbone, max_rank: int | None, max_groups: int | None, max_columns: int | None, rows: int | None = None
) -> ExportedProgram:
    """The graph of a backbone.

    Args:
        backbone: from `exportable`.
        max_rank, max_groups: fixed r and G; None leaves them open.
        max_columns: the longest row, for runtimes that reserve memory; None leaves it open.
        rows: fixed number of rows; None leaves it open.
    """
    blocks, width = len(backbone.blocks), backbone.width
    batch, columns, groups, rank = rows or 2, 5, max_groups or 2, max_rank or 3
    past = backbone.empty_past(batch, 6)
    total = columns + (6 if past else 0)
    some = Dim.AUTO if max_columns is None else Dim.AUTO(max=max_columns)
    row: Any = Dim.STATIC if rows else Dim.AUTO
    group: Any = Dim.STATIC if max_groups else Dim.AUTO
    ranks: Any = Dim.STATIC if max_rank else Dim.AUTO
    arguments: dict[str, tuple[Tensor, dict[int, Any]]] = {
        "input_ids": (torch.ones(batch, columns, dtype=torch.long), {0: row, 1: some}),
        "attention_mask": (torch.ones(batch, total, dtype=torch.long), {0: row, 1: some}),
        "edit_mask": (torch.ones(batch, columns, groups), {0: row, 1: some, 2: group}),
    }
    if not isinstance(backbone, BakedBackbone):
        arguments["down"] = torch.ones(blocks, groups, rank, width), {1: group, 2: ranks}
        arguments["bias"] = torch.ones(blocks, groups, rank), {1: group, 2: ranks}
        arguments["up"] = torch.ones(blocks, groups, rank, width), {1: group, 2: ranks}
    shapes: dict[str, Any] = {name: shape for name, (_, shape) in arguments.items()}
    if past:
        shapes["past"] = tuple({0: row, 2: some} for _ in past)
    example = (*(tensor for tensor, _ in arguments.values()), *past)
    with torch.no_grad():
        return torch.export.export(backbone, example, dynamic_shapes=shapes, strict=False)


def input_names(backbone: Backbone | BackboneDescription) -> tuple[list[str], list[str]]:
    """Names of a graph's inputs and outputs, in order."""
    baked = isinstance(backbone, BakedBackbone) or getattr(backbone, "baked", None) is not None
    own = ["input_ids", "attention_mask", "edit_mask", *([] if baked else ["down", "bias", "up"])]
    kept = [f"{number}.{part}" for number in range(len(backbone.cache or [])) for part in ("key", "value")]
    return own + [f"past.{name}" for name in kept], ["logits"] + [f"present.{name}" for name in kept]


class Format(ABC):
    """A kind of file.

    Attributes:
        file: its name in a backbone's folder.
        dtypes: of weights that it can hold.
        needs: packages, for the message when they are missing.
    """

    file: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = tuple(FLOATS)
    needs: ClassVar[str] = ""
    default_rank: ClassVar[int | None] = None
    default_groups: ClassVar[int | None] = None
    default_columns: ClassVar[int | None] = None
    rows: ClassVar[int | None] = None

    @abstractmethod
    def write(self, program: ExportedProgram, names: tuple[list[str], list[str]], path: Path, dtype: str) -> None:
        """Write a traced backbone, whose inputs and outputs have these names."""

    @abstractmethod
    def open(self, path: Path, description: BackboneDescription) -> Run:
        """A file as a function of tensors."""


class Onnx(Format):
    """ONNX, for onnxruntime on servers, desktops, phones and in browsers."""

    file = "backbone.onnx"
    dtypes = ("float32", "float16", *INTEGERS)
    needs = "onnx, onnxscript and onnxruntime: pip install peft-reft[export]"

    def write(self, program: ExportedProgram, names: tuple[list[str], list[str]], path: Path, dtype: str) -> None:
        import onnx
        import onnx_ir

        made = torch.onnx.export(program, input_names=names[0], output_names=names[1], dynamo=True, verbose=False)
        assert made is not None
        if dtype in INTEGERS:
            float_path = path.with_suffix(".float.onnx")
            onnx_ir.save(made.model, str(float_path), external_data=f"{float_path.name}.data")
            del made
            quantise(float_path, path, dtype)
            for left in path.parent.glob(f"{float_path.name}*"):
                left.unlink()
        else:
            weights = sum(
                value.const_value.nbytes for value in made.model.graph.initializers.values() if value.const_value
            )
            onnx_ir.save(made.model, str(path), external_data=f"{path.name}.data" if weights > ONE_FILE else None)
        onnx.checker.check_model(str(path))

    def open(self, path: Path, description: BackboneDescription) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]

        def run(*arguments: Tensor) -> Sequence[Tensor]:
            feeds = {name: argument.numpy() for name, argument in zip(names, arguments, strict=True)}
            return [torch.from_numpy(found) for found in session.run(None, feeds)]

        return run


class Pt2(Format):
    """torch.export's own archive, for Python and AOTInductor."""

    file = "backbone.pt2"

    def write(self, program: ExportedProgram, names: tuple[list[str], list[str]], path: Path, dtype: str) -> None:
        torch.export.save(program, path)

    def open(self, path: Path, description: BackboneDescription) -> Run:
        # Without guards: they would refuse rows of less than four columns, which the graph computes as any others.
        module: Callable[..., Any] = torch.export.load(path).module(check_guards=False)
        return lambda *arguments: module(*arguments)


class Pte(Format):
    """ExecuTorch, for phones and small devices; what XNNPACK takes of the graph runs there.

    Its runtime reserves memory: rows, ranks, groups and columns are bounded.
    """

    file = "backbone.pte"
    dtypes = ("float32",)
    needs = "executorch, in an environment with the torch that it wants"
    default_rank, default_groups, default_columns, rows = 8, 2, 512, 1

    def write(self, program: ExportedProgram, names: tuple[list[str], list[str]], path: Path, dtype: str) -> None:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        config = EdgeCompileConfig(_check_ir_validity=False)
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], compile_config=config)
        with open(path, "wb") as file:
            lowered.to_executorch().write_to_file(file)

    def open(self, path: Path, description: BackboneDescription) -> Run:
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(str(path)).load_method("forward")
        return lambda *arguments: method.execute([argument.contiguous() for argument in arguments])


FORMATS: dict[str, Format] = {"onnx": Onnx(), "pt2": Pt2(), "pte": Pte()}


def quantise(source: Path, target: Path, dtype: str) -> None:
    """An ONNX backbone with weights of 8 or 4 bits; activations, the cache and the edits stay in float32.

    Args:
        source, target: ONNX files.
        dtype: "int8" or "int4": blocks of 32 weights with a scale and a zero of their own; in int4 the embeddings,
            too, for which onnxruntime has no 8 bits. (Rounding activations as well, as its `quantize_dynamic` does,
            made nonsense of SmolLM2-135M.)
    """
    import onnx
    from onnxruntime.quantization import quant_utils
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    model = with_transposed_weights(onnx.load(source))
    config = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK,
        bits={"int8": 8, "int4": 4}[dtype],
        is_symmetric=False,
        accuracy_level=4,
        quant_format=quant_utils.QuantFormat.QOperator,
        op_types_to_quantize=("MatMul", "Gather") if dtype == "int4" else ("MatMul",),
    )
    quantiser = MatMulNBitsQuantizer(model, algo_config=config)
    quantiser.process()
    onnx.save(quantiser.model.model, target)


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


def export_backbone(
    backbone: Backbone,
    folder: str | Path,
    format: str = "onnx",
    *,
    dtype: str = "float32",
    max_rank: int | None = None,
    max_groups: int | None = None,
    max_columns: int | None = None,
    base_model: str | None = None,
    baked: str | None = None,
) -> BackboneDescription:
    """Write a backbone and its description into a folder.

    Args:
        backbone: from `exportable`.
        folder: gets `backbone.onnx`, `.pt2` or `.pte`, and `backbone.json`.
        format: "onnx", "pt2" or "pte".
        dtype: of the weights; a backbone in floating point is cast, "int8" and "int4" are ONNX's.
        max_rank, max_groups, max_columns: see `BackboneDescription`; None leaves them open, which ExecuTorch cannot: it
            takes 8, 2 and 512.
        base_model: name of the model; None for what its config says.
        baked: positions of the adapter in a backbone with one inside.

    Raises:
        ValueError: for a format or dtype that there is not.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is none that a backbone is written in; use one of {', '.join(FORMATS)}.")
    kind = FORMATS[format]
    if dtype not in kind.dtypes:
        raise ValueError(f"dtype={dtype!r} is none for format={format!r}; use one of {', '.join(kind.dtypes)}.")
    for name, size in (("max_rank", max_rank), ("max_groups", max_groups), ("max_columns", max_columns)):
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} leaves no room for an adapter; it must be at least 1.")
    max_rank, max_groups = max_rank or kind.default_rank, max_groups or kind.default_groups
    max_columns = max_columns or kind.default_columns
    backbone.model.to(FLOATS.get(dtype, torch.float32))
    sizes = {"max_rank": max_rank, "max_groups": max_groups, "max_columns": max_columns, "baked": baked, "dtype": dtype}
    description = describe(backbone, kind.file, base_model, **sizes)
    program = trace(backbone, max_rank, max_groups, max_columns, kind.rows)
    with staged(folder) as stage:
        kind.write(program, input_names(backbone), stage / kind.file, dtype)
        description.save(stage)
    return description


def open_backbone(folder: str | Path) -> tuple[Run, BackboneDescription]:
    """A backbone in a folder as a function, and its description.

    Returns:
        A function of input_ids, attention_mask, edit_mask, down, bias, up and the past, which returns logits and the
        next past; and what it takes.

    Raises:
        ValueError: if the folder has none, or its graph cannot be read.
    """
    folder = Path(folder)
    description = BackboneDescription.load(folder)
    kind = next((kind for kind in FORMATS.values() if kind.file == description.file), None)
    path = folder / Path(description.file).name
    if kind is None or not path.is_file():
        raise ValueError(
            f"{str(folder)!r} describes the graph {description.file!r}, which is missing or of no known kind."
        )
    try:
        return kind.open(path, description), description
    except ImportError as error:
        raise ValueError(f"{str(path)!r} needs {kind.needs} ({error}).") from error
    except Exception as error:  # of the runtime's own kinds
        raise ValueError(
            f"{str(path)!r} cannot be opened ({' '.join(str(error).split())[:300]}); the file is damaged."
        ) from error


def empty_past(description: BackboneDescription, rows: int = 1) -> list[Tensor] | None:
    """The cache of new rows; None for a backbone without a cache."""
    if description.cache is None:
        return None
    dtype = FLOATS[description.cache_dtype]
    return [
        torch.zeros(rows, layer.heads, 0, width, dtype=dtype)
        for layer in description.cache
        for width in (layer.key, layer.value)
    ]
