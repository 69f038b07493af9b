"""The folder that runner.py puts into PYTHONPATH: what stands here, every Python process that a program starts imports."""
