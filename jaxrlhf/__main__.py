"""python -m jaxrlhf: lists the commands."""

COMMANDS = {
    "train": "run the stages that a config names: sft, reward_model, ppo",
    "generate": "answer prompts with a run's base, SFT and PPO policy, or with a model folder",
    "export": "write a run's model as a folder: merged, PEFT adapter, or reward model",
    "plan": "memory, work, exchange and least time of a run on N cards, without cards or weights",
    "bench": "time each program of a run against the limits of this machine",
}

if __name__ == "__main__":
    print("jaxrlhf aligns language models with human preferences. Commands:\n")
    for name, what in COMMANDS.items():
        print(f"  python -m jaxrlhf.{name:10} {what}")
    print("\nEach explains itself with --help.")
