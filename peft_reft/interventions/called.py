"""What an intervention adds that is called as a module: built-in, or of the user's own."""

from __future__ import annotations

from torch import Tensor, nn

from peft_reft.interventions.equations import Intervention
from peft_reft.interventions.interchange import InterchangeIntervention, VanillaIntervention

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
OURS = (Intervention, InterchangeIntervention, VanillaIntervention)  # whose forward is h + edit(h, ...)


def edit_of(intervention: nn.Module, *states: Tensor, keep: Tensor | None = None) -> Tensor:
    """What an intervention adds to `h` [..., d].

    Args:
        states: `h`, and the source [..., d] for an intervention that takes one.
        keep: [..., 1], a factor for each vector's edit; or with r in the place of 1, one for each direction, which
            interventions with parts take; None for 1.
    """
    if keep is not None and keep.shape[-1] == 1:
        return edit_of(intervention, *states) * keep
    given = states if keep is None else (*states, keep)
    # A forward of the instance is accelerate's, which fetches offloaded weights; hooks may do so, too.
    is_plain = "forward" not in vars(intervention) and not has_hooks(intervention)
    if is_plain and any(type(intervention).forward is cls.forward for cls in OURS):
        edit: Tensor = intervention.edit(*given)  # type: ignore[operator]
        return edit
    dtype = next((p.dtype for p in intervention.parameters() if p.is_floating_point()), states[0].dtype)
    given = tuple(tensor.to(dtype) for tensor in given)  # weights in float32 need not know of models in half precision
    edited: Tensor = intervention(*given)
    return edited - given[0]


def has_hooks(module: nn.Module) -> bool:
    """Whether something waits for the module to be called: hooks of a user's own, of pruning, norms or sharding."""
    own = module.__dict__  # reading attributes of a module takes longer
    return any(map(own.get, HOOKS))
