"""The oracle as a backend: slow; it runs only when it is asked for by name."""
