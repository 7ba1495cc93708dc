"""Drafters without training, one file each."""
