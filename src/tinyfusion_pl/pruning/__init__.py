"""The method in plain PyTorch: patterns, gates, gated blocks, the weight update beside them, the decision and the surgery."""

from tinyfusion_pl.pruning.adapters import WeightUpdate
from tinyfusion_pl.pruning.blocks import get_stack
from tinyfusion_pl.pruning.decision import Decision, GroupDecision, StackDecision
from tinyfusion_pl.pruning.discovery import Discovery, discover, find_stacks, resolve_stacks
from tinyfusion_pl.pruning.distributions import CandidateDistribution, MaskDistribution
from tinyfusion_pl.pruning.gate_optimizer import GateOptimizer
from tinyfusion_pl.pruning.gates import DepthGates, find_gates, remove_gates
from tinyfusion_pl.pruning.hard_concrete import HardConcreteDistribution
from tinyfusion_pl.pruning.lora import remap_lora
from tinyfusion_pl.pruning.patterns import Group, Pattern
from tinyfusion_pl.pruning.pruner import DepthPruner
from tinyfusion_pl.pruning.relaxations import Relaxation
from tinyfusion_pl.pruning.stack_gates import StackGates
from tinyfusion_pl.pruning.surgery import remove_blocks
from tinyfusion_pl.pruning.tau_schedule import linear_anneal
from tinyfusion_pl.pruning.verification import verify

__all__ = [
    "CandidateDistribution", "Decision", "DepthGates", "DepthPruner", "Discovery", "GateOptimizer", "Group", "GroupDecision",
    "HardConcreteDistribution", "MaskDistribution", "Pattern", "Relaxation", "StackDecision", "StackGates", "WeightUpdate", "discover",
    "find_gates", "find_stacks", "get_stack", "linear_anneal", "remap_lora", "remove_blocks", "remove_gates", "resolve_stacks", "verify",
]  # fmt: skip
