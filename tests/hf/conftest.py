from small_models import *  # noqa: F403  (fixtures of small random models)
