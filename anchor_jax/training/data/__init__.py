"""Training data: prompts, videos, trajectories, and their order."""
