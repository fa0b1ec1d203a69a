"""The load of experiments/benchmarks/serve_load.py, shorter: no stream lost or mixed, memory flat, all blocks back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "experiments" / "benchmarks" / "serve_load.py"


@pytest.mark.scale
def test_many_streaming_clients_get_their_solo_replies_while_others_hang_up() -> None:
    command = [sys.executable, str(SCRIPT), "--clients", "40", "--seconds", "15", "--requests", "30", "--blocks", "48"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["whole replies"] > 100
    assert result["hung up"] > 20
    assert result["blocks free at the end"] == result["blocks"] == 48
    assert result["wrong"] == result["failed"] == []
