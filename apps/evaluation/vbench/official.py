"""Runs one dimension of the official VBench; executed by VBench's own interpreter, not imported.

    python official.py SUITE VIDEOS OUT DIMENSION DEVICE

Uses nothing of this project: that environment has other versions of everything. The package's own
command hides failures (its exit code is always 0), so its class is called, and the result file is
what counts.
"""

import sys


def main() -> None:
    suite, videos, out, dimension, device = sys.argv[1:]
    import torch
    from vbench import VBench  # pyright: ignore  # of the other interpreter

    judge = VBench(torch.device(device), suite, out)
    judge.evaluate(
        videos_path=videos, name=dimension, dimension_list=[dimension], local=False,
        read_frame=False, mode="vbench_standard", imaging_quality_preprocessing_mode="longer",
    )  # fmt: skip


if __name__ == "__main__":
    main()
