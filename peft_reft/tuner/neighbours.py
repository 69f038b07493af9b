"""Where integrations are asked: the tuner knows none of them, they register here.

PEFT and transformers offer no such places; docs/upstream.md says which of them would make this file unnecessary.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import nn

from peft_reft.context.method import MethodEntry

# Called with the base model after an adapter was injected into it.
ON_INJECTION: list[Callable[[nn.Module], None]] = []
# Called with the directory in which an adapter's config was saved, which PEFT writes last.
AFTER_SAVING: list[Callable[[str | os.PathLike[str]], None]] = []
# Further classes of what stands in for methods of a model that generates.
METHODS: list[type[MethodEntry]] = []
