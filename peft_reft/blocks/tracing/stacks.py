"""The stacks of blocks among the lists of modules that ran in a trace."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from peft_reft.blocks.tracing.layouts import traced_layout
from peft_reft.blocks.tracing.traced_model import BlockList, TracedModel


def traced_stacks(model: TracedModel) -> list[list[str]]:
    """The main list of blocks of each side, encoder first, with those that run in parallel to it.

    Raises:
        ValueError: if an adapter cannot work on them, with the reason.
    """
    if not model.traces:
        return []
    sides: dict[bool, list[BlockList]] = {}
    for found in model.lists():
        is_decoder = model.columns(found.ran[0])[0] != model.traces[0].columns
        sides.setdefault(is_decoder, []).append(found)
    has_decoder = len(sides) == 2
    if has_decoder and not getattr(model.model.config, "is_encoder_decoder", False):
        del sides[True]  # of a text diffusion model: it refines a draft, and has no prompt
    stacks = []
    for is_decoder, lists in sorted(sides.items()):
        candidates = [found for found in lists if not found.leaves]
        if not candidates:
            continue
        main = max(candidates, key=lambda found: found.size)
        twins = [f for f in candidates if (f.kind, f.size, len(f.names)) == (main.kind, main.size, len(main.names))]
        if len(twins) == 1:
            twins = [_last_of_round(model, main, lists)]
            _refuse_sharing(model, twins[0])
        for twin in twins:
            _refuse_maps(model, twin)
            # Decoders that read the cache of an encoder's blocks read no output of the last one.
            is_read = not has_decoder or is_decoder or model.affects_output(twin.names[-1])
            stacks.append(twin.names if is_read else twin.names[:-1])
    return stacks


def _last_of_round(model: TracedModel, main: BlockList, lists: Sequence[BlockList]) -> BlockList:
    """Where lists of parts take turns, so that no module is the block: the list whose parts end each round."""
    if len(main.ran) < 2 or _is_chain(model, main):
        return main
    order = {call.name: number for number, call in enumerate(model.traces[0].calls)}
    turns = [
        found
        for found in lists
        if len(found.ran) == len(main.ran) and all(len(model.calls(name)) == 1 for name in found.ran)
    ]
    rounds = list(zip(*([order[name] for name in found.ran] for found in turns)))
    if len(turns) < 2 or any(max(one) > min(other) for one, other in pairwise(rounds)):
        return main
    return max(turns, key=lambda found: order[found.ran[0]])


def _is_chain(model: TracedModel, found: BlockList) -> bool:
    """Whether blocks are given what the ones before them returned."""
    for one, other in pairwise(found.ran):
        output = model.calls(one)[0].output
        if any(given is output for given in model.calls(other)[0].inputs):
            return True
    return False


def _refuse_sharing(model: TracedModel, found: BlockList) -> None:
    in_order = [call.name for call in model.traces[0].calls if call.name in found.names]
    again = next((one for one, other in pairwise(in_order) if one == other), None)
    if again is not None:
        raise ValueError(
            f"{type(model.model).__name__} runs the same block several times in a row ({again!r}: "
            f"{in_order.count(again)} times), so that its depths cannot have interventions of their own. "
            f"ReftConfig(target_modules=[{again!r}]) edits its output every time it runs."
        )


def _refuse_maps(model: TracedModel, found: BlockList) -> None:
    for name in found.ran:
        if traced_layout(model, name) is None:
            traced = model.traces[0]
            given = f"{traced.rows} images" if traced.is_image else f"{traced.rows} rows of {traced.columns} tokens"
            raise ValueError(
                f"The block {name!r} of {type(model.model).__name__} returns hidden states of shape "
                f"{list(model.shapes(name)[0])} for {given}: they hold no vectors that could be counted. Name modules "
                "that return [B, S, d] in ReftConfig(target_modules=[...]), or any modules together with "
                "positions='all'."
            )
