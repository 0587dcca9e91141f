"""Work that is killed, or meets a full disk, a deleted folder, little memory or a second process, goes on.

The next run leaves the files of one that nothing has befallen, bit for bit. Each command is killed KILLS
times at random moments, by default once, and meets one other trouble. With KILLS=10 it meets all of them
twice.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KILLS = int(os.environ.get("KILLS", "1"))
SEED = int(os.environ.get("KILLS_SEED", "0"))
WORK = ("build_modules", "build_features", "train", "compare_methods", "communities")
WORK += ("labels", "compare", "ladder", "family", "gates")
TROUBLES = {"kill", "fill_disk", "delete_folder", "take_memory", "work_twice_at_once"}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """How often each work met each trouble, or what went wrong; one process imports for all."""
    home = tmp_path_factory.mktemp("killed")
    code = f"import killers; killers.try_all({str(home)!r}, {WORK}, {KILLS}, seed={SEED})"
    limit = 300 + 120 * KILLS
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", WORK)
def test_work_goes_on_to_the_same_files(said, name, record_property):
    met = said[name]
    assert isinstance(met, dict), met
    assert set(met) == TROUBLES and met["kill"] >= KILLS
    record_property("kills", met["kill"])
    record_property("other troubles", sum(met.values()) - met["kill"])
