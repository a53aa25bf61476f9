"""FID, sFID, Inception score, precision and recall, as ADM's evaluation suite computes them.

ADM's suite (Dhariwal and Nichol, 2021; guided-diffusion, evaluations/) is TensorFlow 1; this is the same arithmetic on
torch-fidelity's port of the same Inception.
"""
