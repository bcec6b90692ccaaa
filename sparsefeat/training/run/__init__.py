"""A run: recipes, settings, steps, checkpoints, what is measured on the way."""
