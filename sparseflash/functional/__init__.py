"""Attention as functions of tensors: what a call is checked for, the operators behind it, decoding."""
