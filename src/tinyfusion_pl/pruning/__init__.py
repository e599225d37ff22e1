"""The method in plain PyTorch: patterns, gates, gated blocks, the weight update beside them, the decision and the surgery."""

from tinyfusion_pl.pruning.adapters import WeightUpdate
from tinyfusion_pl.pruning.blocks import get_stack
from tinyfusion_pl.pruning.decision import Decision, GroupDecision, StackDecision
from tinyfusion_pl.pruning.discovery import Discovery, discover, find_stacks, resolve_stacks
from tinyfusion_pl.pruning.gates import DepthGates, StackGates, find_gates, remove_gates
from tinyfusion_pl.pruning.lora import remap_lora
from tinyfusion_pl.pruning.patterns import Group, Pattern
from tinyfusion_pl.pruning.samplers import CandidateSampler, MaskSampler
from tinyfusion_pl.pruning.schedule import linear_anneal
from tinyfusion_pl.pruning.surgery import remove_blocks

__all__ = [
    "CandidateSampler", "Decision", "DepthGates", "Discovery", "Group", "GroupDecision",
    "MaskSampler", "Pattern", "StackDecision", "StackGates", "WeightUpdate", "discover",
    "find_gates", "find_stacks", "get_stack", "linear_anneal", "remap_lora", "remove_blocks", "remove_gates",
    "resolve_stacks",
]
