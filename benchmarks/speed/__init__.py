"""How fast prefixes are, beside PEFT and the bare model: ``python -m benchmarks.speed``."""
