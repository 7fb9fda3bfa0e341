"""Networks as plain data: specification, cost, search space; and their modules."""
