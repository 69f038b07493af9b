"""ReFT next to LoRA and others on a real language model: see README.md."""
