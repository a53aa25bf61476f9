"""The checkpoints that PixelGen's authors release (huggingface.co/zehongma/PixelGen), to our model folders and back."""
