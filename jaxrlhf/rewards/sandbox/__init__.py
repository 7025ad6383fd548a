"""Runs code that a model wrote. `pool` starts the processes, `inside` is the program that runs in them."""
