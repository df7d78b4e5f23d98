"""Runs the package on recorded cases and compares every recorded number."""
