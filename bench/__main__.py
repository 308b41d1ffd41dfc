"""`python -m bench`: all benchmarks, or those that are named."""

import tyro

from bench.cli import main

if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench")
