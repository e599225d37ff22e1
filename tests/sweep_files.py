"""The files for `wandb sweep`, expanded without a server as its agent does."""

import itertools
from pathlib import Path

import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

FILES = sorted((Path(__file__).parents[1] / "sweeps").glob("*.yaml"))


def config_of(file):
    """As `wandb sweep` reads it and hands it to the server."""
    return yaml.safe_load(yaml.dump(yaml.safe_load(file.read_text())))


def arms_of(config):
    """Arms that together have every value of a list and both ends of every range; of a grid all."""
    names, choices = list(config["parameters"]), []
    for space in config["parameters"].values():
        choices.append(space["values"] if "values" in space else [space["min"], space["max"]])
    if config["method"] == "grid":
        return [dict(zip(names, values)) for values in itertools.product(*choices)]
    longest = max(map(len, choices))
    return [dict(zip(names, [each[i % len(each)] for each in choices])) for i in range(longest)]


def command_of(config, arm):
    """The words that the agent runs, as `wandb.wandb_agent.Agent._command_run` puts them together."""
    known = create_sweep_command_args(
        {"args": {name: {"value": each} for name, each in arm.items()}}
    )
    known |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [config["program"]]}
    words = []
    for word in create_sweep_command(list(config["command"])):
        words += known[word[2:-1]] if word.startswith("${") else [str(word)]
    return words


def overrides_of(words):
    assert words[:4] == ["/usr/bin/env", "python", "-m", "tinyfusion_pl"]
    return words[4:]
