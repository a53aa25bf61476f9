"""DPG-Bench (Hu et al. 2024, ELLA): long prompts, and yes-or-no questions about each, which depend on each other."""
