"""`python -m benchmarks.gpu`: the clock starts before the imports, which take their part of the minutes."""

import time

BEGIN = time.monotonic()

if __name__ == "__main__":
    from benchmarks.gpu.run import main

    main(begin=BEGIN)
