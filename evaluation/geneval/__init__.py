"""GenEval (Ghosh et al. 2023): prompts, what a detector has to tell, the rules, and the scores."""
