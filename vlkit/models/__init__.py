"""Dual encoders: the interface, open_clip behind it, models on disk, and images and texts to vectors."""
