"""`python -m dpsynth …`: the same as the `dpsynth` command; `-m` sweeps with any Hydra launcher."""

from dpsynth.cli import main

if __name__ == "__main__":
    main()
