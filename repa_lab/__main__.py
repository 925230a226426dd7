"""`python -m repa_lab`, which is how torchrun and accelerate launch start it in several processes."""

from repa_lab.cli import main

if __name__ == "__main__":
    main()
