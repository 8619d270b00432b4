"""Time and memory, here and on other machines, and cuts to a measured time."""
