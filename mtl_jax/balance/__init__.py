"""Sharing one update among tasks: weights from observations, and what they are applied to."""
