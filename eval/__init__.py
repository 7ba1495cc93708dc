"""Scoring of heads on MMSpec; imports mmspec, never train."""
