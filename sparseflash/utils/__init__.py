"""Helpers of several folders: untrusted files, locks, imports by name."""
