"""What a hidden state stands for: alignments by interchange interventions, causal tracing, and drift of edits.

The interventions themselves are adapters like any other, `ReftConfig(intervention="interchange")`, and train in any
trainer. collator.py makes batches with sources, boundary.py trains how many directions are exchanged, accuracy.py
measures an alignment, collect.py reads hidden states at places, trace.py restores them one by one, drift.py follows an
edit through later blocks; probe.py lends a model an adapter without parameters while the last three look at it.
"""

from peft_reft.causal.accuracy import interchange_accuracy
from peft_reft.causal.boundary import BoundaryAnnealing, set_temperature
from peft_reft.causal.collator import InterchangeCollator
from peft_reft.causal.collect import collect
from peft_reft.causal.drift import edit_drift
from peft_reft.causal.trace import Trace, trace

__all__ = [
    "BoundaryAnnealing",
    "InterchangeCollator",
    "Trace",
    "collect",
    "edit_drift",
    "interchange_accuracy",
    "set_temperature",
    "trace",
]
