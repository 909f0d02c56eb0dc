"""The one exception that means "your input", never "our bug" (asserts mean that)."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: what is wrong, where, which rule it breaks and what to try next.

    The command line prints it as one paragraph and exits with 2.

    >>> print(InputError("replicas_max is 0", where="policy.yaml:7 autoscaler.replicas_max", rule="at least 1", fix="set it to 1"))
    policy.yaml:7 autoscaler.replicas_max: replicas_max is 0 (rule: at least 1). Try: set it to 1
    """

    def __init__(self, what: str, *, where: str = "", rule: str = "", fix: str = "") -> None:
        self.what, self.where, self.rule, self.fix = what, where, rule, fix
        text = f"{where}: {what}" if where else what
        text += f" (rule: {rule})" if rule else ""
        super().__init__(f"{text}. Try: {fix}" if fix else text)
