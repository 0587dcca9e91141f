"""Work that is killed at random moments and started again leaves the files of work that was never killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WORK = ("build_modules", "build_features", "train", "compare", "find", "label", "search")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """How often each work was killed before its end, or what went wrong; one process imports for all."""
    home = tmp_path_factory.mktemp("killed")
    code = f"import killers; killers.kill_all({str(home)!r}, 2, seed=0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", WORK)
def test_killed_work_goes_on_to_the_same_files(said, name):
    assert isinstance(said[name], int), said[name]
    assert said[name] >= 1, "it was never killed before its end"


def test_all_work_is_killed(said):
    assert set(said) == set(WORK)
