"""An engine that answers and prints its answers, for tests of engines with worker processes. Reads a JSON order."""

import json
import sys


def main() -> None:
    from engines import Asked, engine

    order = json.load(sys.stdin)
    with engine(order["base"], max_loras=2, **order["settings"]) as llm:
        asked = Asked(llm, order["adapters"])
        found = [
            list(output.outputs[0].token_ids) for output in asked.generate([tuple(pair) for pair in order["pairs"]])
        ]
    print("ANSWERS", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
