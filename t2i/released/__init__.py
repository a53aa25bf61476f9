"""Checkpoints as the authors of PixelGen and PixelDiT release them, to our model folders and back."""
