"""`sparsefeat evaluate`: a file a benchmark."""
