"""Paired measurements: each prints a table of ratios and writes JSON."""
