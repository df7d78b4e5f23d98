"""The data of trainings: prompts, videos, trajectories, and their order."""
