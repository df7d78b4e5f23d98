"""Metrics of any video. Each module is one metric: its name, and its `METRIC`."""
