"""`python -m lean_attention`."""

from lean_attention.tools.command_line import main

if __name__ == "__main__":
    main()
