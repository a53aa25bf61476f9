"""Scores of finished images."""
