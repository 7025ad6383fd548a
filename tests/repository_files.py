"""Reads the repository's pages and configs, for tests."""

import re


def blocks(page, language):
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def sources(config):
    """(key path, settings) of each data source of a config's stages."""
    for stage in config.stages:
        section = getattr(config, stage)
        for key, source in (("data", section.data), ("evaluation.data", section.evaluation.data)):
            if source is not None:
                yield f"{stage}.{key}", source
