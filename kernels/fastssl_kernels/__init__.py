"""Fused losses for self-supervised learning. Needs torch and triton only."""
