"""Commands of the `accel` program, one file each; `apps/cli.py` registers them."""
