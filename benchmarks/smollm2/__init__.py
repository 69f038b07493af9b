"""What small adapters learn in SmolLM2-135M-Instruct on a CPU: long strings, and a manner, and how long it holds."""
