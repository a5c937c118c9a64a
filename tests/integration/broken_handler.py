"""A function that does not initialise."""

print("about to fail")
raise ImportError("no module named what_it_needs")
