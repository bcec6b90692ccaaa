"""Codes to rows."""
