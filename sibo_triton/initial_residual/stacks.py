"""Find the stacks of transformer blocks in a model, without knowing the model's name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True, eq=False)
class BlockStack:
    """One list of transformer blocks that a hidden state passes through.

    Attributes:
        name: the list's name from the base model's root ("model.layers").
        blocks: the blocks, without wrappers (checkpoint_wrapper, FSDP).
        owner: the module whose forward runs the blocks, and `owner_name`, its name from the root.
    """

    name: str
    blocks: tuple[nn.Module, ...]
    owner: nn.Module
    owner_name: str

    def holds(self, module_name: str) -> bool:
        """Whether the module of that name lies inside one of the blocks."""
        return module_name.startswith(self.name + ".")


def stack_of(module_name: str, stacks: Sequence[BlockStack]) -> BlockStack | None:
    """The stack that holds the module of that name, or None."""
    return next((stack for stack in stacks if stack.holds(module_name)), None)


def inner_module(module: nn.Module) -> nn.Module | None:
    """The module inside torch's `checkpoint_wrapper`, FSDP1 or torch.compile; None if the module is no such wrapper."""
    for attribute in ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"):
        inner = module._modules.get(attribute)
        if inner is not None:
            return inner
    return None


def unwrap_block(block: nn.Module) -> nn.Module:
    """The block itself, without wrappers."""
    inner = inner_module(block)
    return block if inner is None else unwrap_block(inner)


def find_block_stacks(root: nn.Module, names: Sequence[str] | None = None) -> list[BlockStack]:
    """Find the stacks of `root`: the outermost lists whose items are all transformers' blocks, or those named.

    Args:
        root: the base model.
        names: the block lists' names from the root (the option `sibo_blocks`); None detects them.

    Raises:
        ValueError: a name is not that of a non-empty list of modules, or no list was detected.
    """
    if names is not None:
        return [_named_stack(root, name) for name in names]
    stacks: list[BlockStack] = []
    for name, module in root.named_modules():
        if not isinstance(module, nn.ModuleList) or any(stack.holds(name) for stack in stacks):
            continue
        blocks = [unwrap_block(block) for block in module.children()]  # a list may hold None (Informer)
        if blocks and all(isinstance(block, GradientCheckpointingLayer) for block in blocks):
            stacks.append(_stack(root, name, module))
    if not stacks:
        raise ValueError(
            f"No list of transformer blocks was found in {type(root).__name__}: none of its nn.ModuleLists holds only "
            f"transformers GradientCheckpointingLayers. Name the list from the model's root in sibo_blocks=[...]. "
            f"{_lists_of(root)} A model without blocks gets the plain method: sibo_lambda=0."
        )
    return stacks


def _named_stack(root: nn.Module, name: str) -> BlockStack:
    modules = dict(root.named_modules())
    if name not in modules:  # an adapter saved with a head around the model also loads without it, and vice versa
        alike = [other for other in modules if other and (name.endswith(f".{other}") or other.endswith(f".{name}"))]
        alike = [other for other in alike if isinstance(modules[other], (nn.ModuleList, nn.Sequential))]
        if len(alike) != 1:
            raise ValueError(
                f"sibo_blocks names {name!r}, which {type(root).__name__} does not have. {_lists_of(root)}"
            )
        name = alike[0]
    module = modules[name]
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not list(module.children()):
        raise ValueError(
            f"sibo_blocks names {name!r}, a {type(module).__name__}, but a non-empty nn.ModuleList or nn.Sequential of "
            "blocks is needed."
        )
    return _stack(root, name, module)


def _lists_of(root: nn.Module) -> str:
    names = [name for name, module in root.named_modules() if _may_be_list_of_blocks(module)]
    return f"Its lists of modules are: {', '.join(names[:20]) or 'none'}."


def _may_be_list_of_blocks(module: nn.Module) -> bool:
    children = [unwrap_block(child) for child in module.children()]
    if isinstance(module, nn.Sequential):
        return len(children) > 1 and len(set(map(type, children))) == 1 and any(True for _ in children[0].children())
    return isinstance(module, nn.ModuleList) and len(module) > 0


def _stack(root: nn.Module, name: str, module: nn.Module) -> BlockStack:
    owner_name = name.rpartition(".")[0]
    while isinstance(root.get_submodule(owner_name), _CONTAINERS):  # a container has no forward of its own
        owner_name = owner_name.rpartition(".")[0]
    blocks = tuple(unwrap_block(block) for block in module.children())
    return BlockStack(name, blocks, root.get_submodule(owner_name), owner_name)


def path_between(root: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules from `root` down to the module called `name`, both included."""
    yield root
    parts = name.split(".") if name else []
    for end in range(1, len(parts) + 1):
        yield root.get_submodule(".".join(parts[:end]))
