"""One evaluation of a network, from a genome to a typed outcome, on one rank or several."""
