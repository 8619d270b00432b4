"""How important a unit is, what it costs, and which columns go together."""
