"""Training: the small trainer and the stages of the embedded model."""
