"""Do the parsers survive a bounded run of the fuzz target, and would the target notice if they did not?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TARGET = Path(__file__).with_name("fuzz_sal.py")
RUNS = 30000


def fuzz(program: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *program, f"-runs={RUNS}", "-seed=1", f"-artifact_prefix={directory}/"],
        cwd=directory,
        env=os.environ | {"TMPDIR": str(directory)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_nothing_is_found_in_a_bounded_run(tmp_path: Path) -> None:
    done = fuzz([str(TARGET)], tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"Done {RUNS} runs" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_parser_that_fails_on_one_shape_is_found(tmp_path: Path) -> None:
    # The same target, with a parser that breaks on SOURCE extensions of three addresses.
    broken = tmp_path / "broken.py"
    broken.write_text(
        f"import sys; sys.path.insert(0, {str(TARGET.parent)!r})\n"
        "import fuzz_sal\n"
        "parse = fuzz_sal.sal.parse\n"
        "def fails_on_three(data):\n"
        "    packet = parse(data)\n"
        "    if len(packet.source_addresses) == 3:\n"
        "        raise IndexError('three')\n"
        "    return packet\n"
        "fuzz_sal.sal.parse = fails_on_three\n"
        "fuzz_sal.main()\n"
    )
    done = fuzz([str(broken)], tmp_path)
    assert done.returncode != 0
    assert "IndexError: three" in done.stdout + done.stderr
