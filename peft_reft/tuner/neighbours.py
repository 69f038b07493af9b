"""Where other parts of the package ask to be called by the tuner, which imports none of them.

`peft_reft.integrations.register` fills the lists; a function in them takes its own imports when it is called.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import nn

# Called with the base model after an adapter was injected into it.
ON_INJECTION: list[Callable[[nn.Module], None]] = []

# Called with the directory after an adapter's config, which PEFT writes last, was saved there.
AFTER_SAVING: list[Callable[[str | os.PathLike[str]], None]] = []
