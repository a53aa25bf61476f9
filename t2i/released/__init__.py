"""The checkpoints that the authors of PixelGen and PixelDiT release, to our model folders and back."""
