"""The example's script, on a few rows: every step of the main job runs, on both kinds of model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples/table_to_text.py"


def run(*arguments):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("method", ["p-tuning-v2", pytest.param("prefix-tuning", marks=pytest.mark.slow)])
def test_embedded_model(method, tmp_path):
    out = run("--method", method, "--max-train", 32, "--max-test", 6, "--epochs", 1, "--output", tmp_path)
    assert re.search(r"BLEU on 6 test inputs: \d+\.\d before, \d+\.\d after", out)
    assert out.count("  generated  ") == 3
    assert "it generates the same sentences" in out
    assert (tmp_path / "prefix/prefix.safetensors").stat().st_size < 4e6


def test_any_model_and_any_file(tmp_path):
    model = tiny.make("bart", vocab_size=2048)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(ROOT / "examples/gpt2-e2e-base").save_pretrained(tmp_path / "model")
    rows = [json.dumps({"question": f"what is {n}", "answer": str(n)}) for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    out = run(
        *("--model", tmp_path / "model", "--train", tmp_path / "rows.jsonl", "--test", tmp_path / "rows.jsonl"),
        *("--source-field", "question", "--target-field", "answer", "--epochs", 1, "--output", tmp_path / "out"),
    )
    assert "it generates the same sentences" in out
