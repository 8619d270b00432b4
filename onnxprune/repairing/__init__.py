"""Repair without training: layers fitted to the uncut ones, and batch normalisation's statistics."""
