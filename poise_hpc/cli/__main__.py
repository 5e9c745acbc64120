"""`python -m poise_hpc.cli`."""
from . import main

main()
