"""The stages of training, each with its steps and its compiled programs."""
