"""Verifiers: what tells a good sample from a bad one. See ``protocol.py``."""
