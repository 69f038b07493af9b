"""Backbones as files: ONNX, PT2 or for ExecuTorch, written from a traced graph and opened again.

Each format is a `Format`: how it is written, and how a file of it is run from Python, with the same arguments in the
same order (`answers.Run`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

from peft_reft.export.answers import Run
from peft_reft.export.backbone import Backbone, BakedBackbone
from peft_reft.export.description import BackboneDescription, describe
from peft_reft.export.files import FLOATS
from peft_reft.export.graph import Sizes, first_cause, trace
from peft_reft.export.inputs import checked
from peft_reft.export.quantise import INTEGERS, ONE_FILE, quantise
from peft_reft.info.files import one_line
from peft_reft.tuner.staging import staged


class Format(ABC):
    """A kind of file.

    Attributes:
        file: its name in a backbone's folder.
        dtypes: of weights that it can hold.
        packages: that it needs, beyond those of this package.
        needs: the same in words, and where they come from.
        sizes: of inputs, where a caller fixes none.
        experts: transformers' `experts_implementation` that it can hold; None where that does not matter.
    """

    file: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = tuple(FLOATS)
    packages: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[str] = ""
    sizes: ClassVar[Sizes] = Sizes()
    experts: ClassVar[str | None] = None

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
    packages = ("onnx", "onnxscript", "onnxruntime")
    needs = "onnx, onnxscript and onnxruntime: pip install peft-reft[export]"
    experts = "batched_mm"

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
    """ExecuTorch, for phones and small devices: XNNPACK runs what it takes of the graph, plain kernels the rest.

    Its runtime reserves memory: rows, ranks, groups and columns are bounded.
    """

    file = "backbone.pte"
    dtypes = ("float32",)
    packages = ("executorch",)
    needs = "executorch, in an environment with the torch that it wants"
    experts = "batched_mm"
    sizes = Sizes(rank=8, groups=2, columns=512, rows=1)

    def write(self, program: ExportedProgram, names: tuple[list[str], list[str]], path: Path, dtype: str) -> None:
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        config = EdgeCompileConfig(_check_ir_validity=False)
        lowered = to_edge_transform_and_lower(program, partitioner=self.partitioners(), compile_config=config)
        with open(path, "wb") as file:
            lowered.to_executorch().write_to_file(file)

    def partitioners(self) -> list[Any]:
        """What takes parts of the graph to a library of its own."""
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

        return [XnnpackPartitioner()]

    def open(self, path: Path, description: BackboneDescription) -> Run:
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(str(path)).load_method("forward")
        return lambda *arguments: method.execute([argument.contiguous() for argument in arguments])


class PortablePte(Pte):
    """ExecuTorch with its plain kernels alone, which run wherever there is a C++ compiler."""

    def partitioners(self) -> list[Any]:
        return []


FORMATS: dict[str, Format] = {"onnx": Onnx(), "pt2": Pt2(), "pte": Pte(), "pte-portable": PortablePte()}


def refuse_missing_packages(format: str) -> None:
    """Raises a ValueError that names what a format needs, if that is not installed."""
    missing = [name for name in FORMATS[format].packages if find_spec(name) is None]
    if missing:
        raise ValueError(f"format={format!r} needs {FORMATS[format].needs}. {missing[0]!r} is not installed.")


def export_backbone(
    backbone: Backbone,
    folder: str | Path,
    format: str = "onnx",
    *,
    quantised: str | None = None,
    max_rank: int | None = None,
    max_groups: int | None = None,
    max_columns: int | None = None,
    base_model: str | None = None,
    progress: Callable[[str], object] | None = None,
) -> BackboneDescription:
    """Write a backbone and its description into a folder.

    Args:
        backbone: from `exportable`. Its weights are written in the precision that they have.
        folder: gets `backbone.onnx`, `.pt2` or `.pte`, and `backbone.json`.
        format: "onnx", "pt2", "pte" or "pte-portable".
        quantised: "int8" or "int4" rounds the weights of a float32 model, in ONNX; None leaves them.
        max_rank: the largest r of an adapter; None leaves it open, but for ExecuTorch, which takes 8.
        max_groups: the most position groups; None leaves them open, but for ExecuTorch, which takes 2.
        max_columns: the longest row; None leaves it open, but for ExecuTorch, which takes 512.
        base_model: name of the model; None for what its config says.
        progress: is called with a line when the graph is traced and the longest step begins.

    Raises:
        ValueError: for a format or precision that there is not, for a package that is missing, and for a model that
            cannot be exported, with the reason. Nothing is written then.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is none that a backbone is written in; use one of {', '.join(FORMATS)}.")
    kind = FORMATS[format]
    own = str(backbone.dtype).removeprefix("torch.")
    dtype = quantised or own
    if dtype not in kind.dtypes or (quantised is not None and (quantised not in INTEGERS or own != "float32")):
        what = f"quantised={quantised!r} of a model in {own}" if quantised else f"A model in {own}"
        raise ValueError(
            f"{what} is nothing that format={format!r} holds: that is one of {', '.join(kind.dtypes)}, and whole "
            "numbers are made of float32. Load the model in that precision."
        )
    for name, size in (("max_rank", max_rank), ("max_groups", max_groups), ("max_columns", max_columns)):
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} leaves no room for an adapter; it must be at least 1.")
    sizes = kind.sizes._replace(columns=max_columns or kind.sizes.columns)
    if isinstance(backbone, BakedBackbone):
        if max_rank or max_groups:
            raise ValueError(
                f"max_rank={max_rank} and max_groups={max_groups} are sizes of inputs, and this backbone takes no "
                "adapter as an input: one is baked in. Leave them out."
            )
        sizes = sizes._replace(rank=None, groups=backbone.groups)
    else:
        sizes = sizes._replace(rank=max_rank or kind.sizes.rank, groups=max_groups or kind.sizes.groups)
    refuse_missing_packages(format)
    description = describe(backbone, kind.file, sizes, base_model, dtype)
    program = trace(backbone, sizes)
    if progress is not None:
        progress(f"The graph returns what the model returns; writing {kind.file}")
    try:
        with staged(folder) as stage:
            kind.write(program, input_names(backbone), stage / kind.file, dtype)
            description.save(stage)
    except ImportError as error:
        raise ValueError(f"format={format!r} needs {kind.needs} ({one_line(error)}).") from error
    except OSError:  # a full disk, a folder that is not to be written to
        raise
    except Exception as error:  # of the format's own tools
        hint = f"A model of experts is written when it is loaded with experts_implementation={kind.experts!r}. "
        raise ValueError(
            f"{type(backbone.model).__name__} cannot be written as format={format!r} ({one_line(first_cause(error))}). "
            f"{hint if kind.experts else ''}Another format may hold it: "
            f"{', '.join(name for name in FORMATS if name != format)}."
        ) from error
    return description


def open_backbone(folder: str | Path) -> tuple[Run, BackboneDescription]:
    """A backbone in a folder as a function, and its description.

    Returns:
        A function of input_ids, attention_mask, edit_mask, down, bias, up and the past, which returns logits and the
        next past; and what it takes. Inputs that do not fit each other or the graph raise a ValueError.

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
        return checked(kind.open(path, description), description), description
    except ImportError as error:
        raise ValueError(f"{str(path)!r} needs {kind.needs} ({one_line(error)}).") from error
    except Exception as error:  # of the runtime's own kinds
        raise ValueError(f"{str(path)!r} cannot be opened ({one_line(error)}); the file is damaged.") from error


def input_names(backbone: Backbone) -> tuple[list[str], list[str]]:
    """Names of a graph's inputs and outputs, in order."""
    own = ["input_ids", "attention_mask", "edit_mask"]
    own += [] if isinstance(backbone, BakedBackbone) else ["down", "bias", "up"]
    kept = [f"{number}.{part}" for number in range(len(backbone.cache or [])) for part in ("key", "value")]
    return own + [f"past.{name}" for name in kept], ["logits"] + [f"present.{name}" for name in kept]
