"""What a saved adapter is, read from its directory alone: `adapter_info`, `python -m peft_reft info DIR`.

No model is loaded, nothing is executed and nothing is fetched. files.py opens the files, as strangers may have made
them, reading.py finds the parameters in them, measuring.py looks at those of a block, words.py puts the config into
words, adapter.py has it all together, command.py is the command.
`peft_reft.inspect` shows what an adapter does to the tokens of a prompt.
"""

from peft_reft.info.adapter import AdapterInfo, adapter_info
from peft_reft.info.command import main
from peft_reft.info.measuring import BlockInfo

__all__ = ["AdapterInfo", "BlockInfo", "adapter_info", "main"]
