"""Edits of images, and how well they keep the background, by MSE and SSIM."""
