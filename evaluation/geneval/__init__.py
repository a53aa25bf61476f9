"""GenEval (Ghosh et al. 2023): prompts, detectors, rules and scores."""
