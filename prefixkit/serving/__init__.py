"""A prefix in programs that know nothing of prefixkit, and proof that it is not lost there."""
