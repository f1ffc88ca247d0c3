"""Loading says nothing, and both libraries are as talkative afterwards as they were."""

from __future__ import annotations

import diffusers.utils.logging
import transformers.utils.logging

import accel
from accel.loading import quiet_loading
from accel.testing import tiny

LOGGING = (diffusers.utils.logging, transformers.utils.logging)


def _settings():
    return [(x.is_progress_bar_enabled(), x.get_verbosity()) for x in LOGGING]


def test_nothing_is_printed_and_settings_come_back(tmp_path, capfd):
    tiny("dit").pipe.save_pretrained(tmp_path)
    before = _settings()
    capfd.readouterr()
    with quiet_loading():
        accel.load(tmp_path)
    accel.load("zoo:digits-sd")  # has a text encoder
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert _settings() == before
