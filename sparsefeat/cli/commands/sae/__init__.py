"""`sparsefeat sae …`: a file a command."""
