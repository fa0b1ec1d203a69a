import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.tokenizers.sampling import cut, sample_text


@settings(deadline=None)
@given(text=st.text(alphabet="ab\n ", max_size=300), limit=st.integers(1, 50))
def test_parts_make_up_the_text_and_none_is_too_long(text: str, limit: int) -> None:
    parts = list(cut(text, limit, "\n"))
    assert "".join(parts) == text
    assert all(0 < len(part) <= limit for part in parts)
    # A part ends within a line only where the line leaves no choice.
    assert all(part.endswith("\n") or "\n" not in part for part in parts[:-1])


def test_a_corpus_within_the_limit_is_kept_whole_and_in_order() -> None:
    documents = ["alpha\n" * 3000, "", "omega", "é" * 9000]
    sample = sample_text(documents, 1 << 20)
    assert "".join(sample.blocks) == "".join(documents)
    assert sample.num_bytes == sample.corpus_bytes == len("".join(documents).encode())
    assert sample.num_documents == 4


@pytest.mark.parametrize(
    "documents", [[f"{i:07d}\n" * 125 for i in range(1000)], [f"{i:07d}\n" for i in range(125_000)]]
)
def test_a_sample_fills_its_limit_and_keeps_the_order(documents: list[str]) -> None:
    sample = sample_text(documents, 100_000)
    assert 100_000 - 5000 < sample.num_bytes <= 100_000
    assert sample.corpus_bytes == 1_000_000
    numbers = [int(line) for block in sample.blocks for line in block.split()]
    assert numbers == sorted(numbers)
    # Uniform over the corpus: the mean of n uniform draws has a standard deviation of range / sqrt(12 n).
    blocks = [int(block.split()[0]) for block in sample.blocks]
    deviation = len(documents) / np.sqrt(12 * len(blocks))
    assert abs(np.mean(blocks) - len(documents) / 2) < 4 * deviation


def test_one_long_document_is_sampled_within() -> None:
    lines = [f"{i:07d}\n" for i in range(125_000)]
    sample = sample_text(["".join(lines)], 1 << 16)
    assert 60_000 < sample.num_bytes <= 1 << 16
    assert set("".join(sample.blocks).splitlines(keepends=True)) <= set(lines)  # no line is broken


def test_the_sample_depends_on_the_corpus_and_the_seed_alone() -> None:
    documents = [f"{i}\n" * 100 for i in range(3000)]
    samples = [sample_text(iter(documents), 1 << 16, seed=seed).blocks for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    script = (
        "import hashlib; from llmlab.tokenizers.sampling import sample_text; "
        r"blocks = sample_text([f'{i}\n' * 100 for i in range(3000)], 1 << 16).blocks; "
        "print(hashlib.sha256(''.join(blocks).encode()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == hashlib.sha256("".join(samples[0]).encode()).hexdigest()


def test_progress_counts_documents() -> None:
    reports: list[tuple[int, int | None, str]] = []
    sample_text(["x" * 600_000] * 5, 1 << 16, progress=lambda *report: reports.append(report))
    assert reports == [(2, None, "documents"), (4, None, "documents"), (5, 5, "documents")]
