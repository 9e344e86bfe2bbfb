"""Whole training steps through each kind of attention: the models, and how a step is timed."""
