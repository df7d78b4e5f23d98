"""Training: losses, rollouts, stages, data, and the loop that runs them."""
