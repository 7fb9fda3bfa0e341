"""``python -P -m dmi_hpc``: what `dmi` does, for launchers that know only the interpreter."""

from dmi_hpc.cli import main

if __name__ == "__main__":
    main()
