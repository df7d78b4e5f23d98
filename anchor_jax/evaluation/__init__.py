"""Measuring what a model generates."""
