"""Exporting: a frozen backbone as one graph in which edits are inputs, and adapters as files of a few kilobytes.

models.py says which models can be exported, backbone.py is the module whose edits are inputs, caches.py its keys and
values as plain tensors, graph.py traces it, programs.py writes and opens the formats (ONNX, PT2, ExecuTorch),
quantise.py rounds weights. masks.py says which tokens are edited, tensors.py what an adapter multiplies with, files.py
what an app downloads, description.py what a graph says of itself, inputs.py what it is given, answers.py the loop that
runs it, check.py whether a file is the model, command.py `python -m peft_reft export`.
"""

from peft_reft.export.answers import greedy_answer
from peft_reft.export.backbone import BakedBackbone, EditableBackbone, exportable
from peft_reft.export.command import main
from peft_reft.export.description import BackboneDescription
from peft_reft.export.files import load_adapter_tensors, save_adapter_tensors
from peft_reft.export.masks import edit_mask
from peft_reft.export.programs import export_backbone, open_backbone
from peft_reft.export.tensors import EditTensors, adapter_tensors

__all__ = [
    "BackboneDescription",
    "BakedBackbone",
    "EditTensors",
    "EditableBackbone",
    "adapter_tensors",
    "edit_mask",
    "export_backbone",
    "exportable",
    "greedy_answer",
    "load_adapter_tensors",
    "main",
    "open_backbone",
    "save_adapter_tensors",
]
