"""What the command line sets up for the process that it starts."""

import os
import subprocess
import sys

import pytest

GROWTH = """
import os
from pathlib import Path
from lrlhf.cli.start import keep_few_kernels
{setting}
import torch
page = os.sysconf("SC_PAGE_SIZE")
resident = lambda: page * int(Path("/proc/self/statm").read_text().split()[1])
x, weight = (torch.ones(rows, 576, dtype=torch.bfloat16) for rows in (1300, 576))
before = resident()
for rows in range(1, 1300, 2):
    torch.nn.functional.linear(x[:rows], weight)
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_lines_of_ever_new_lengths_do_not_fill_memory_with_kernels():
    fresh = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}

    def growth(setting: str) -> int:
        code = GROWTH.format(setting=setting)
        command = [sys.executable, "-c", code]
        return int(subprocess.run(command, env=fresh, capture_output=True, text=True, check=True).stdout)

    without = growth("")
    if without < 200 * 2**20:
        pytest.skip("oneDNN makes no kernels for shapes on this processor")
    assert growth("keep_few_kernels()") < without / 2
