"""DPG-Bench (Hu et al. 2024, ELLA): long prompts, yes-or-no questions about each, and what depends on what."""
