"""Smaller tensors, the record of what went, and the check that the rest computes the same."""
