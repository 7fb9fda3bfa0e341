"""DMI-HPC: from a materials data set to the best network an allocation can find."""

__version__ = "0.1.0"
