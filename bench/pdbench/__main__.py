"""`python -m pdbench` is the `pdbench` command."""

from pdbench.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
