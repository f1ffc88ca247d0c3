"""Evaluation as jobs: the same calls rendered without and with recipes, then compared.

Reading order: request (what is asked, and which tasks that makes), tasks (what a worker does),
figures (from parts to a report), page and plots (the report for people). `apps/evaluate.py` is the
entry.
"""
