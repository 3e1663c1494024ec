"""Whether every tensor of a prefix gets a gradient: looked at when training begins, and again after each evaluation.

A base can swallow gradients without a word: quantised layers whose kernels have no backward pass, or lose it when
they are made ready for inference; a ``detach`` or ``no_grad`` inside. What a prefix gets then is nothing, or a part.

``grad is None`` says little: ``zero_grad`` makes it so, and in p-tuning v2 all layers share one tensor, which has a
gradient if one of them has. So hooks note where gradients arrive: at the keys and values of every site, and at the
parameters behind them. What they are compared with is the graph: a tensor from which a way leads to an output that
got a gradient must get one itself, in the same backward pass. Where no way leads from a site's keys and values to any
output, though the attention took them, the graph is cut. Neither judges

- a forward pass that no backward pass follows, or one of an output that is not used;
- a backward pass for other tensors only (``torch.autograd.grad``, ``backward(inputs=...)``);
- prefixes that are frozen, or that no row of a call names; sites that are not called; layers left out at random.

If nothing at all gets a gradient, the loss has no graph, and torch itself raises. The exception is a head that trains
beside the prefix, so a stack in training that gives out no graph raises right away.

The check costs a walk through the graph, in the few steps that it is made in; in a compiled graph it is not made.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefixkit import transformers_internals as internals
from prefixkit.attachment import MODULE, Attachment
from prefixkit.errors import EngineError

if TYPE_CHECKING:
    from prefixkit.mixture import Mixture
    from prefixkit.prefix_state import PrefixState

Node = Any
"""A node of autograd's graph."""
Edge = tuple[Node, int]
"""A tensor there: the node that made it, and which of its results it is."""
SHOWN = 4
"""So many names in a message; there may be hundreds."""
FEW = 4
"""So many calls of a stack are watched at a time."""
REASONS = (
    "Usual reasons: a quantised base without a backward pass (torchao with dynamic activations), or one that has lost "
    "it in a forward pass in eval mode (bitsandbytes nf4 on CPUs with AVX512-BF16: load the base anew, and evaluate "
    "another copy); detach() or torch.no_grad() inside the base; a layer whose output is thrown away at random, "
    "which a layerdrop above 0 in the model's config would say. docs/how-to/low-memory.md lists bases that train"
)


@dataclass
class GradientCheck:
    """When it is time to look.

    Attributes:
        due: Whether the next forward pass that records a graph is to be watched.
        modes: Whether each stack was in training mode in the last such pass, by its path.
        waiting: Watched calls that no backward pass has gone through yet, each with the key of its stack's state.
    """

    due: bool = True
    modes: dict[str, bool] = field(default_factory=dict)
    waiting: list[tuple[str, weakref.ref[Watch]]] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no calls that wait."""
        return {**vars(self), "waiting": []}

    def waits(self, key: str) -> int:
        """How many watched calls of the stack with the state ``key`` have not been looked at, and still may be."""
        watches = ((key, one, one()) for key, one in self.waiting)
        self.waiting = [(key, one) for key, one, watch in watches if watch is not None and not watch.judged]
        return sum(stack == key for stack, _ in self.waiting)

    def sees(self, path: str, module: nn.Module) -> bool:
        """Whether to watch the call of the stack at ``path`` that begins now."""
        if _is_in_graph():
            return False
        if not torch.is_grad_enabled():
            self.due = True
            return False
        if self.modes.get(path) is not module.training:
            self.due = True
            self.modes[path] = module.training
        return self.due


def _is_in_graph() -> bool:
    """Whether a graph is being made of this call, or torch.func transforms it: hooks would not tell the truth."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return bool(torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed)  # type: ignore[attr-defined, no-untyped-call]


class Watch:
    """The tensors of the prefix in one call of a stack, and which of them got a gradient.

    Sets of tensors are numbers here, one bit for each.

    Args:
        check: Told when all is well.
        tensors: By what they are called in messages; several of a site may have its name.
        places: For each the site's place, or ``None`` for a parameter.
        base: What quantises the base, for messages.
    """

    def __init__(
        self, check: GradientCheck, tensors: list[tuple[str, torch.Tensor]], places: list[str | None], base: str
    ) -> None:
        self.check = check
        self.names: list[str] = [name for name, _ in tensors]
        self.places = places
        self.base = base
        self.edges: list[Edge] = [_edge(tensor) for _, tensor in tensors]
        self.asked: set[str] = set()
        self.cut: int = 0
        self.judged = False
        self.tasks: dict[int, tuple[int, int]] = {}
        # What hangs on the tensors must not hold their nodes: such a circle is never freed.
        self.arrived: set[int] = set()
        handles = [tensor.register_hook(partial(_note, self.arrived, i)) for i, (_, tensor) in enumerate(tensors)]
        weakref.finalize(self, _take_off, handles)

    def leaves(self, output: Any, *, training: bool) -> None:
        """The stack has given ``output``.

        Raises:
            EngineError: If nothing in it has a graph, and the stack is in training.
        """
        tensors = [tensor for tensor in _tensors_in(output) if tensor.is_floating_point()]
        taken = sum(1 << i for i, place in enumerate(self.places) if place in self.asked)
        reached = self.anchor(tensors)
        if tensors and taken and training and not any(tensor.requires_grad for tensor in tensors):
            raise self._cut(taken)
        self.cut = taken & ~reached if tensors else 0  # what it gave may be of a kind that nobody looks into

    def anchor(self, tensors: Iterable[torch.Tensor]) -> int:
        """Look at the backward passes that go through ``tensors``; the set from which a way leads to one of them."""
        wanted = {edge: 1 << i for i, edge in enumerate(self.edges)}
        known: dict[Node, int] = {}
        reached = 0
        for tensor in tensors:
            if tensor.requires_grad and tensor.grad_fn is not None:
                behind = _reached(tensor.grad_fn, wanted, known)
                tensor.register_hook(partial(self._passes, behind))
                reached |= behind
        return reached

    def _passes(self, behind: int, grad: torch.Tensor | None) -> None:
        """A gradient has arrived at an output: all that stands behind it has to get one in this backward pass."""
        task = torch._C._current_graph_task_id()
        if not self.check.due or task < 0 or grad is None:
            return
        if task not in self.tasks:
            runs = sum(1 << i for i, (node, _) in enumerate(self.edges) if _will_run(node))
            self.tasks[task] = 0, runs
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._judge, task))
        before, runs = self.tasks[task]
        self.tasks[task] = before | behind, runs

    def _judge(self, task: int) -> None:
        """At the end of a backward pass.

        Raises:
            EngineError: If a tensor got no gradient, and should have.
        """
        behind, runs = self.tasks.pop(task)
        self.judged = True
        if self.cut:
            raise self._cut(self.cut)
        due = behind & runs
        lost = due & ~sum(1 << i for i in self.arrived)
        if lost:
            raise EngineError(
                f"no gradient arrived at {self._named(lost)} in this backward pass, so they would stay as they are. "
                f"A layer behind them gives none back{self.base}. {REASONS}"
            )
        if due:
            self.check.due = False

    def _cut(self, which: int) -> EngineError:
        return EngineError(
            f"nothing that the model gave out depends on {self._named(which)}, so they would get no gradient. "
            f"The graph is cut behind them{self.base}. {REASONS}"
        )

    def _named(self, which: int) -> str:
        names = list(dict.fromkeys(name for i, name in enumerate(self.names) if which >> i & 1))
        more = len(names) - SHOWN
        return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _note(arrived: set[int], index: int, grad: torch.Tensor | None) -> None:
    """Hooks are called with ``None`` where a layer gave nothing back."""
    if grad is not None:
        arrived.add(index)


def _take_off(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _will_run(node: Node) -> bool:
    """Whether the backward pass under way computes a gradient there; not if it was asked for others only."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # of a leaf in torch.autograd.grad
        return False


def _edge(tensor: torch.Tensor) -> Edge:
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _reached(root: Node, wanted: Mapping[Edge, int], known: dict[Node, int]) -> int:
    """Which of the tensors ``wanted`` stand behind ``root``; ``known`` keeps what was found."""
    stack = [root]
    while stack:
        node = stack[-1]
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        unknown = [] if node in known else [following for following, _ in edges if following not in known]
        if unknown:
            stack += unknown
            continue
        found = 0
        for edge in edges:
            found |= wanted.get(edge, 0) | known[edge[0]]
        known[node] = found
        stack.pop()
    return known[root]


def _tensors_in(output: Any) -> Iterator[torch.Tensor]:
    """Tensors in tuples and mappings, such as transformers' outputs; caches are neither."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _tensors_in(part)
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors_in(part)


_stacks: ContextVar[Mapping[str, Watch]] = ContextVar("prefixkit_watched_stacks", default={})  # noqa: B039 - never written to
"""The watched calls of stacks that are under way in this thread, by the key of the stack's state."""
_model: ContextVar[list[Watch] | None] = ContextVar("prefixkit_watched_model", default=None)
"""Those that have ended in the call of a model that is under way."""


def begin(
    check: GradientCheck, key: str, served: Attachment | Mixture, state: PrefixState | None, module: nn.Module
) -> None:
    """Watch the call of a stack from here on, if anything of its prefix trains.

    A few calls that wait for their backward pass are enough: where calls build on one another, as token by token on
    a cache, each would walk through the graphs of all before it.
    """
    if check.waits(key) >= FEW:
        return
    used = [served] if isinstance(served, Attachment) else list(served.used.values())
    parameters = [
        (repr(f"{MODULE}.{one.config.name}.{name}"), value)
        for one in used
        for name, value in one.encoder.named_parameters()
        if value.requires_grad
    ]
    if not parameters:
        return
    parts = [] if state is None else [part for part in state.parts() if part[1].requires_grad]
    paths = {site.place: f"the prefix of {site.path!r}" for site in served.layout.sites}
    tensors = [(paths[place], part) for place, part in parts] + parameters
    places = [place for place, _ in parts] + [None] * len(parameters)
    watch = Watch(check, tensors, places, internals.quantised_by(module))
    if state is not None and state.witness is not None:
        watch.asked = state.witness.asked
    check.waiting.append((key, weakref.ref(watch)))
    _stacks.set({**_stacks.get(), key: watch})


def end(key: str, module: nn.Module, output: Any) -> None:
    """The call of a stack has ended.

    Raises:
        EngineError: If the prefix can get no gradient through what it gave.
    """
    watch = _stacks.get().get(key)
    if watch is None:
        return
    if internals.may_drop_layers(module):
        watch.asked = set()
    watch.leaves(output, training=module.training)
    ended = _model.get()
    if ended is not None:
        ended.append(watch)


def forget(key: str) -> None:
    """The call of a stack is over, whether it has ended or failed."""
    if key in _stacks.get():
        _stacks.set({other: watch for other, watch in _stacks.get().items() if other != key})


class OpenModel:
    """Forward pre-hook of a model: what its stacks give goes into what it gives."""

    def __call__(self, _module: nn.Module, _args: Any) -> None:
        """Begin to collect the watched calls."""
        if not _is_in_graph():
            _model.set([])


class CloseModel:
    """Forward hook of a model, also where its forward fails: losses and logits are outputs to look at too."""

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Look at the backward passes that go through what the model gave."""
        if _is_in_graph():
            return
        watched = _model.get()
        _model.set(None)
        for watch in watched or ():
            watch.anchor(_tensors_in(output))
