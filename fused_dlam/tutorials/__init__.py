"""Seven tutorials, each a script that is read from top to bottom and run by `fused-dlam tutorial N`. See README.md.

Each module has WORKERS, the number of processes it is written for, `run()`, which all workers call and which returns
what was found, and `draw(found)`, which returns a matplotlib figure of it.
"""

#: The modules, in their order.
ALL = ("hello", "consensus", "gradient_descent", "bias_correction", "directed", "asynchrony", "deep_learning")
