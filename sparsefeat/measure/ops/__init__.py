"""A file a kind of op: who computes it, what is right, what it costs."""
