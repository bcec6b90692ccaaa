"""Gradients of weights, latent by latent."""
