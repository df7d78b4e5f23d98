"""Metrics of generated videos, and trials that generate videos to score."""
