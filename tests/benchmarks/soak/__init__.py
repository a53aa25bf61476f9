"""The parts of kill_soak.py: runs, what kills them, and what they are compared with."""
