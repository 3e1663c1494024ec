"""Every model type of transformers, tiny."""
