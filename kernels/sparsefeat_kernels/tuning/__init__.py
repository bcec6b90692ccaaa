"""Block sizes measured on a GPU: their table, and the command that measures it."""
