"""Differential privacy: the mechanism, and what it costs. Knows nothing of Flower."""
