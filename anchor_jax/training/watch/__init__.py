"""What operators watch while a training runs: time, profiles, slow hosts."""
