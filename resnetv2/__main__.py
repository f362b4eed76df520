"""`python -m resnetv2` is the command `resnetv2`."""

from resnetv2.cli import main

if __name__ == "__main__":
    main()
