"""`python -m fastdlp`."""

from fastdlp.cli.main import main

main()
