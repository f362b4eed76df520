"""`python -m resnetv2` is the command `resnetv2`."""

from .cli.command import main

if __name__ == "__main__":
    main()
