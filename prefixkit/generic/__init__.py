"""An adapter for models that no plugin serves: it watches a few tiny forward passes."""
