import subprocess
import sys
from pathlib import Path

import pytest

from accel import zoo


def test_shipped_models_are_found():
    assert {"digits-dit", "digits-judge"} <= set(zoo.names())
    for name in zoo.names():
        assert zoo.path(name).is_dir()


@pytest.mark.parametrize("name", ["digits-dot", "", "../zoo", "world.py", "/tmp"])
def test_unknown_model_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"no embedded model .*; known: .*digits-dit"):
        zoo.path(name)


def test_importing_the_zoo_does_not_import_torch():
    code = "import sys; from accel import zoo; zoo.names(); sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_shipped_weights_are_small():
    weights = sum(f.stat().st_size for f in zoo.path("digits-dit").rglob("*.safetensors"))
    assert weights < 8e6
