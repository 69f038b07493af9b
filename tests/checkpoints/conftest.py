"""The programs here run in environments of their own, with the libraries whose checkpoints these are: not collected."""

collect_ignore_glob = ["*.py"]
