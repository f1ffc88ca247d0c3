"""The app in the browser: a client of the renderer, without rendering logic of its own.

`server.py` is the public file. Reading order: site (what may be named), device (the one worker, and
who is next), trials (Create) and batches (Batch), then one file a tab.
"""
