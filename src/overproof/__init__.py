"""Overproof: distil image classifiers that are small, accurate and hard to fool."""
