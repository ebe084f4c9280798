"""Training: one loop, and what pretraining puts around it."""
