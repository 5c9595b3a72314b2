"""`python -m llmjax`: the command line."""

import sys

from llmjax.cli import main

sys.exit(main())
