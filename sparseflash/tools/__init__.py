"""What looks at the library from outside: the benchmark, the doctor, the demo, timing."""
