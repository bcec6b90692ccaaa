"""Rows to train on: collected into a store, drawn meanwhile, or in memory."""
