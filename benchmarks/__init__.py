"""Measurements, each a script with its conditions; results lie in ``results/``."""
