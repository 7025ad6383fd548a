"""Trackers: services that show the metrics and samples of runs, each by its own client.

A process of its own follows the logs of the run (`process` starts it, `__main__` is its program), so that no client can
stop, slow or disturb the run.
"""

CLIENTS = ("tensorboard", "wandb", "mlflow", "trackio")  # names of the trackers, of their modules and of their extras
