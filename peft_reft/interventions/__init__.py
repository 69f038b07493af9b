"""The equations: modules that edit hidden states, orthonormal rows, many interventions at once, and their names.

Plain torch. Positions, blocks, adapters and models are known elsewhere.
"""

from peft_reft.interventions.batched import FactorMemo, Kind, kind_of, stack_factors
from peft_reft.interventions.boundless import BoundlessIntervention
from peft_reft.interventions.called import HOOKS, edit_of, has_hooks
from peft_reft.interventions.equations import (
    ConsreftIntervention,
    DireftIntervention,
    Factors,
    Intervention,
    LobireftIntervention,
    LoreftIntervention,
    NoreftIntervention,
    OdireftIntervention,
    low_rank_edit,
)
from peft_reft.interventions.interchange import InterchangeIntervention, VanillaIntervention
from peft_reft.interventions.orthonormal import orthonormal_rows
from peft_reft.interventions.parts import PartedRows
from peft_reft.interventions.registry import (
    BUILT_IN,
    REGISTRY,
    build_intervention,
    check_parts,
    intervention_names,
    nearest_name,
    register_intervention,
    takes_source,
)

__all__ = [
    "BUILT_IN",
    "HOOKS",
    "REGISTRY",
    "BoundlessIntervention",
    "ConsreftIntervention",
    "DireftIntervention",
    "FactorMemo",
    "Factors",
    "InterchangeIntervention",
    "Intervention",
    "Kind",
    "LobireftIntervention",
    "LoreftIntervention",
    "NoreftIntervention",
    "OdireftIntervention",
    "PartedRows",
    "VanillaIntervention",
    "build_intervention",
    "check_parts",
    "edit_of",
    "has_hooks",
    "intervention_names",
    "kind_of",
    "low_rank_edit",
    "nearest_name",
    "orthonormal_rows",
    "register_intervention",
    "stack_factors",
    "takes_source",
]
