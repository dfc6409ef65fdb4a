"""How another program's tensors become ours, as data. Imports nothing of this library.

A family's tables are lists of `Row`s, one for every tensor that its file must hold. The same rows
are read in both directions: einops patterns can be turned round.
"""

from typing import NamedTuple

from einops import rearrange


class Row(NamedTuple):
    """One weight of ours and its name and layout in another program's file."""

    ours: str  # path in our tree: "blocks/attention/query/kernel"
    theirs: str  # name in the file; "{}" stands for the layer, and stacks ours along axis 0
    pattern: str = ""  # einops, one layer's tensor of theirs -> ours: "o i -> i o"; "" for as it is

    def to_ours(self, tensor):
        """One layer's tensor, from their layout to ours."""
        return rearrange(tensor, self.pattern) if self.pattern else tensor

    def to_theirs(self, tensor):
        """One layer's tensor, from our layout to theirs."""
        if not self.pattern:
            return tensor
        theirs, ours = self.pattern.split("->")
        return rearrange(tensor, f"{ours} -> {theirs}")
