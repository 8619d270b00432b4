"""Samples, metrics, and a model against the uncut one."""
