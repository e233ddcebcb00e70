"""Pretraining methods, one a file, and the verb that runs them."""
