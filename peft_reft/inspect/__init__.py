"""What an adapter does to the tokens of some prompts: `inspect_adapter`, `python -m peft_reft inspect DIR`.

The model runs as it is, and is left as it was found. run.py says what is run, batch.py makes its inputs, spy.py watches
the layers; deltas.py measures an edit, edits.py and effects.py make the rows of the tables, which tables.py holds and
heatmap.py draws, with names of tokens from tokens.py and fonts from fonts.py; command.py is the command. What the saved
files alone say about an adapter is the work of `peft_reft.info`.
"""

from peft_reft.inspect.command import main
from peft_reft.inspect.run import inspect_adapter
from peft_reft.inspect.tables import Inspection

__all__ = ["Inspection", "inspect_adapter", "main"]
