"""Inference-time noise search: spend compute on better noise, with a budget and a verifier.

Read ``path.py`` (what a candidate is), ``player.py`` (how it is computed), ``session.py`` (what an
algorithm sees), then any algorithm: ``random``, ``zero_order``, ``draft_commit``, ``paths``, ...
"""
