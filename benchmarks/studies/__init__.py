"""Studies of how prefixes learn: one command each, ``python -m benchmarks.studies``."""
