"""`python -m idempotent_bus.cli`."""

from . import main

if __name__ == "__main__":
    main()
