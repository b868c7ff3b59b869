"""What may happen to the steps of a scheduler under test, whichever phase it is of."""

from __future__ import annotations

from typing import Any

from hypothesis.stateful import RuleBasedStateMachine, precondition, rule


class StepRules(RuleBasedStateMachine):
    """At most `depth` steps are decided and not complete; they run, and complete, in their order."""

    worker: Any
    depth: int

    @precondition(lambda self: len(self.worker.decided) < self.depth)
    @rule()
    def decide(self) -> None:
        self.worker.decide()

    @precondition(lambda self: len(self.worker.outputs) < len(self.worker.decided))
    @rule()
    def run(self) -> None:
        self.worker.run()

    @precondition(lambda self: self.worker.outputs)
    @rule()
    def complete(self) -> None:
        self.worker.complete()
