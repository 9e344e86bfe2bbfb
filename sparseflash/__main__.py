"""``python -m sparseflash``: the same as the ``sparseflash`` command."""

from sparseflash.cli import main

if __name__ == "__main__":
    main()
