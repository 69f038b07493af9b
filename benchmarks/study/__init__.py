"""A study of ReFT next to LoRA and others that runs on two CPU cores: see README.md."""
