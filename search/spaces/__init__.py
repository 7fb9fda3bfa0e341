"""What is searched: networks, plain parameters, cells; each a ``search.base.Space``."""
