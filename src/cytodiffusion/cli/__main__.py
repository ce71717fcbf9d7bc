"""`python -m cytodiffusion.cli` is `cytodiffusion`."""

from cytodiffusion.cli.main import main

main()
