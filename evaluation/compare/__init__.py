"""Comparison of runs: settings that differ, what training cost, scores, curves and samples."""
