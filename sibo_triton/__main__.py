"""`python -m sibo_triton`: the same as the command `sibo-triton`."""

from sibo_triton.cli import main

if __name__ == "__main__":
    main()
