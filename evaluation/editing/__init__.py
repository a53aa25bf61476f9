"""Edits of images and how well they keep what was not to be edited: the background, by MSE and SSIM."""
