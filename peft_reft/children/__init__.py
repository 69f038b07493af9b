"""The folder that runner.py puts into PYTHONPATH: Python processes that a program starts import what stands here."""
