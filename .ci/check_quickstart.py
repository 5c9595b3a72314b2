"""Whether a finished quickstart holds what it promises: bits per byte 3 % below gzip's, and every file of a run."""

import json
import sys
from pathlib import Path

GAIN = 0.97
FILES = ["config.json", "data/manifest.json", "metrics.jsonl", "logbook.md", "card.md", "loss.png", "report.html"]


def main(workdir: Path) -> None:
    """Exit with a line that says what is missing or too high."""
    missing = [name for name in FILES if not (workdir / name).exists()]
    if missing:
        sys.exit(f"{workdir} lacks {', '.join(missing)}")
    results = json.loads((workdir / "results.json").read_text())
    ours, gzip = results["bits_per_byte"], results["gzip_bits_per_byte"]
    print(f"held-out bits per byte: {ours:.4f}, gzip -9: {gzip:.4f}, ratio {ours / gzip:.3f} (at most {GAIN})")
    if ours > GAIN * gzip:
        sys.exit(f"bits per byte {ours:.4f} are not {1 - GAIN:.0%} below gzip's {gzip:.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
