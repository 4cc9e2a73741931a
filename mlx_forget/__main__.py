"""`python -m mlx_forget` is the `forget` command."""

from mlx_forget.cli import main

if __name__ == "__main__":
    main()
