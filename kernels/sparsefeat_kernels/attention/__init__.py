"""Maps of attention, without its matrix."""
