"""A whole run: everything is read and checked first, then the stages run in order, each once.

A finished stage is not run again: the same command continues where the run stood.
"""

from pathlib import Path

import jax

from jaxrlhf.config import RunConfig
from jaxrlhf.config_io import dump_config
from jaxrlhf.runtime import hosts
from jaxrlhf.runtime.mesh import make_mesh, place
from jaxrlhf.runtime.metrics import MetricsLog
from jaxrlhf.runtime.run_dir import check_run, open_run
from jaxrlhf.stages import ppo, reward_model, sft
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.roles import Roles, finished_stages, load_roles, save_base


def run_stages(config: RunConfig) -> Roles:
    """Runs the stages of `config` that have not finished yet; the roles at the end.

    Raises `UserError`, before anything is compiled or written, where settings, files, rows or model cannot
    be used.
    """
    hosts.check_started()
    check_run(config.run_dir, dump_config(config))
    mesh = make_mesh(config.mesh)
    roles = load_roles(config, mesh)
    folder = Path(config.run_dir)
    writes = jax.process_index() == 0
    run = Run(
        config,
        mesh,
        MetricsLog(folder / "metrics.jsonl" if writes else None),
        MetricsLog(folder / "samples.jsonl" if writes else None),
    )
    finished = finished_stages(config.run_dir)
    todo = [stage for stage in config.stages if stage not in finished]
    for stage in config.stages:
        if stage in finished:
            run.say(f"{stage}: has finished before")
    inputs = _load_inputs(run, roles, todo)
    makes_base = config.model.new is not None and not (folder / "roles" / "base").is_dir()
    found = {"adapters": sorted(roles.adapters), "finished": sorted(finished), "base to make": makes_base}
    # Every process has then read what is there before process 0 writes more.
    hosts.check_alike(f"things in run_dir {folder}", found, "give a folder on a file system that all hosts share")
    hosts.barrier()
    open_run(config.run_dir, dump_config(config), writes)
    hosts.check_shared(folder / "config.yaml", "run_dir")
    if makes_base:
        save_base(config.run_dir, roles.base, roles.tokenizer)
    roles.base = place(mesh, roles.base)
    train = {"sft": sft.train, "reward_model": reward_model.train, "ppo": ppo.train}
    for stage in todo:
        roles = train[stage](run, roles, inputs[stage])
    run.metrics.close()
    run.samples.close()
    return roles


def _load_inputs(run: Run, roles: Roles, todo: list[str]) -> dict:
    """What each stage reads, so that a bad setting or row of the last one stops the run before the first.

    Settings come before any row, and PPO's reward functions and prompts before the larger sets.
    """
    stages = {"sft": sft, "reward_model": reward_model, "ppo": ppo}
    for stage in todo:
        stages[stage].check(run, roles)
    return {stage: stages[stage].load(run, roles) for stage in reversed(todo)}
