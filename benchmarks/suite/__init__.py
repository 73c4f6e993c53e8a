"""The networks of the suite, what is done to each of them, and the libraries that do it."""
