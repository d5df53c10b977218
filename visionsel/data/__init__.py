"""Readers of data: image folders, real digits, and the order in which training sees them."""
