"""`llmjax import-hf` and `llmjax export-hf`: Hugging Face folders, in and out."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = {
    "import-hf": "example: llmjax import-hf --source=models/tiny-llama --workdir=runs/tiny-llama",
    "export-hf": "example: llmjax export-hf --workdir=runs/quickstart --out=models/quickstart",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --workdir and --source or --out, whichever the verb needs."""
    verb = parser.get_default("verb")
    parser.epilog = EXAMPLES[verb]
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="the run's folder")
    if verb == "import-hf":
        parser.add_argument("--source", type=Path, required=True, metavar="DIR",
                            help="a folder with config.json, safetensors and, if it likes, a tokenizer")
    else:
        parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for transformers")
        parser.add_argument("--weights", choices=("last", "average"), default="last",
                            help="average: that of optim.ema_decay (default last)")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Do what the verb says; returns the exit status."""
    from llmjax.convert.huggingface import export_hf, import_hf

    if args.verb == "import-hf":
        import_hf(args.source, args.workdir)
        print(f"{args.workdir}: try llmjax generate --workdir={args.workdir} --prompt-ids=1,2,3")
    else:
        export_hf(args.workdir, args.out, weights=args.weights)
        print(f"{args.out}: transformers.AutoModelForCausalLM.from_pretrained({str(args.out)!r}) loads it")
    return 0
