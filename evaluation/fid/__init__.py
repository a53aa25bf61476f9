"""How close a set of images is to another: FID, sFID, Inception score, precision and recall, as ADM's suite has them.

ADM's evaluation suite (Dhariwal and Nichol, 2021; guided-diffusion, evaluations/) is TensorFlow 1; this is the same
arithmetic on torch-fidelity's port of the same Inception. `networks` makes features of images, `images` reads them,
`reference` holds what they are compared with, `estimators` is the mathematics, `measure` does the whole over any
number of processes.
"""
