"""An SAE while it learns: start values, dictionaries, constraints; ITDA, which is built in one pass."""
