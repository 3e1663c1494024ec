"""The markers of the conformance kit, and its table: ``pytest --conformance-table conformance.md``."""

pytest_plugins = ["prefixkit.testing.report"]
