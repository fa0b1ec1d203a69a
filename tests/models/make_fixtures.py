"""Write the Hugging Face directories and reference values that the tests of this folder compare with.

    python -m tests.models.make_fixtures [FAMILY ...]           (needs the parity extra: torch and transformers)

Each folder of `fixtures/` is a tiny model of random weights as `transformers` saves it, and `reference.safetensors`:
what `transformers` computes with it in float32 (see references.py). Two runs write the same files.
"""

import importlib
import sys
from pathlib import Path

from tests.models.references import write

FAMILIES = sorted(path.stem for path in (Path(__file__).parent / "families").glob("[a-z]*.py"))


def main(names: list[str]) -> None:
    """Writes the fixtures of these families, or of all."""
    for family in names or FAMILIES:
        for name, case in importlib.import_module(f"tests.models.families.{family}").cases().items():
            write(name, case)
            print(name)


if __name__ == "__main__":
    main(sys.argv[1:])
