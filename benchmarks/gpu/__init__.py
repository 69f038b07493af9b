"""What ReFT costs on a GPU, next to LoRA, in a few minutes: every figure is printed and written when it is known.

    python -m benchmarks.gpu --minutes 4                            # one GPU; 40 GB or more for the 7B shape
    python -m benchmarks.gpu --minutes 4 --only 7B/train,135M/many  # some parts; what the file has already is kept
    python -m benchmarks.gpu --device cpu --shapes tiny --no-write  # does it run

Needs torch, transformers, peft and this repository; models have random weights, in bfloat16. Times are ratios within a
round, as in overhead.py. A part that is in the result file is not measured again, so that a run which ended early is
continued by the same command.
"""
