"""Tools that use the library from outside: benchmark, doctor, demo, timing."""
