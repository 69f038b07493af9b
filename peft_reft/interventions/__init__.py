"""The equations: modules that edit hidden states, orthonormal rows, many interventions at once, and their names.

Plain torch. Positions, blocks, adapters and models are known elsewhere.
"""

from peft_reft.interventions.batched import FactorMemo, Kind, kind_of, stack_factors
from peft_reft.interventions.equations import (
    ConsreftIntervention,
    DireftIntervention,
    Factors,
    Intervention,
    LobireftIntervention,
    LoreftIntervention,
    NoreftIntervention,
    OdireftIntervention,
    edit_of,
    low_rank_edit,
)
from peft_reft.interventions.orthonormal import orthonormal_rows
from peft_reft.interventions.registry import (
    BUILT_IN,
    REGISTRY,
    build_intervention,
    intervention_names,
    nearest_name,
    register_intervention,
)

__all__ = [
    "BUILT_IN",
    "REGISTRY",
    "ConsreftIntervention",
    "DireftIntervention",
    "FactorMemo",
    "Factors",
    "Intervention",
    "Kind",
    "LobireftIntervention",
    "LoreftIntervention",
    "NoreftIntervention",
    "OdireftIntervention",
    "build_intervention",
    "edit_of",
    "intervention_names",
    "kind_of",
    "low_rank_edit",
    "nearest_name",
    "orthonormal_rows",
    "register_intervention",
    "stack_factors",
]
