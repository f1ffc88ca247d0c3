"""The durable renderer: a file of jobs in, finished files out, whatever happens in between.

Reading order: jobs (what a job is), ledger (who works on what), stages (how one is rendered),
worker and executors (where), driver (the loop that ties them together).
"""
