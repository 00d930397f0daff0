"""`python -m tuwen.cli`, the same as `tuwen`."""

from tuwen.cli import main

main()
