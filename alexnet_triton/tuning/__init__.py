"""Which config a launch gets, and what the compiler makes of it."""
