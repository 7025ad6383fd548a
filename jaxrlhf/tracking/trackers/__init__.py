"""Trackers: services that show the metrics and samples of runs, each by its own client.

A separate process follows the logs of the run, so that no client can stop, slow or disturb the run. `process` starts
this process, and `__main__` is its program.
"""

CLIENTS = ("tensorboard", "wandb", "mlflow", "trackio")  # also the names of modules and extras
