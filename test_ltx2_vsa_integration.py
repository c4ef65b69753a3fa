"""examples/test_ltx2_vsa_integration.py, under the path of the original document."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parent / "examples" / Path(__file__).name

if __name__ == "__main__":
    runpy.run_path(str(EXAMPLE), run_name="__main__")
