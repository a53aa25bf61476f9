"""Runs side by side: what differs in their settings, what training cost and came to, scores, curves and pictures."""
