"""The launchers of `launch/cluster.py`, one module for each platform."""
