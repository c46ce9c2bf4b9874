"""``python -m fedlearn`` is ``fedlearn``."""

from fedlearn.cli import main

if __name__ == "__main__":
    main()
