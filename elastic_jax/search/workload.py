"""What a plan is to be fast at, and how long a plan takes at it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from elastic_jax.checkpoint_io import write_json
from elastic_jax.config import ModelConfig
from elastic_jax.errors import ConfigError
from elastic_jax.groups import model_groups
from elastic_jax.plan import CHOICES, Choice
from elastic_jax.search.forward import ROLES, Role
from elastic_jax.step import Bucket

FORMAT = 1

COSTS = "search/costs.json"
"""Where a search keeps those that it used, below the checkpoint."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A typical request, of which `batch` run at the same time.

    Attributes:
        prompt_tokens: of each.
        new_tokens: generated for each.
        batch: requests at the same time.
    """

    prompt_tokens: int
    new_tokens: int
    batch: int

    def __post_init__(self) -> None:
        """Refuses what is no request.

        Raises:
            ConfigError: a number is not positive.
        """
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ConfigError(f"workload: {name} must be at least 1, found {value}")

    @property
    def context(self) -> int:
        """Tokens that a generated one attends to, on average."""
        return self.prompt_tokens + self.new_tokens // 2

    def buckets(self, available: tuple[Bucket, ...]) -> dict[Role, tuple[Bucket, int]]:
        """Which step serves each role, and how many of them a workload takes."""
        prompts = sorted((b for b in available if not b.generated), key=lambda b: b.prompt)
        generated = sorted((b for b in available if not b.prompt), key=lambda b: b.generated)
        tokens = self.batch * self.prompt_tokens
        prompt = next((b for b in prompts if b.prompt >= tokens), prompts[-1])
        decode = next((b for b in generated if b.generated >= self.batch), generated[-1])
        return {
            "prompt": (prompt, -(-tokens // prompt.prompt)),
            "generated": (decode, self.new_tokens * -(-self.batch // decode.generated)),
        }


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of each kind of group by choice, in the step that serves each role of one workload.

    Attributes:
        device: whose.
        measured: whether they were measured on it; otherwise predicted from a description of it.
        workload: what for.
        steps: role -> how many steps the workload takes.
        buckets: role -> the step's tokens.
        groups: role -> kind -> choice -> seconds a step.
        rest: role -> seconds a step of everything that no plan changes: attention, as far as it was looked at.
    """

    device: str
    measured: bool
    workload: Workload
    steps: Mapping[Role, int]
    buckets: Mapping[Role, int]
    groups: Mapping[Role, Mapping[str, Mapping[Choice, float]]]
    rest: Mapping[Role, float]

    @classmethod
    def for_workload(
        cls,
        device: str,
        workload: Workload,
        buckets: tuple[Bucket, ...],
        groups: Mapping[Role, Mapping[str, Mapping[Choice, float]]],
        rest: Mapping[Role, float],
        *,
        measured: bool,
    ) -> Self:
        """Costs of the steps that serve a workload, among those compiled for `buckets`."""
        served = workload.buckets(buckets)
        steps: dict[Role, int] = {role: count for role, (_, count) in served.items()}
        tokens: dict[Role, int] = {role: bucket.tokens for role, (bucket, _) in served.items()}
        return cls(device, measured, workload, steps, tokens, groups, rest)

    def of_group(self, kind: str, choice: Choice) -> float:
        """Seconds that one group takes of the workload's time."""
        return sum(self.steps[role] * self.groups[role][kind][choice] for role in ROLES)

    def of_plan(self, config: ModelConfig, choices: Mapping[str, Choice]) -> float:
        """Seconds of the workload."""
        fixed = sum(self.steps[role] * self.rest[role] for role in ROLES)
        return fixed + sum(self.of_group(group.kind, choices[name]) for name, group in model_groups(config).items())

    def of_step(self, config: ModelConfig, choices: Mapping[str, Choice], role: Role) -> float:
        """Seconds of one step of a role."""
        groups = model_groups(config).items()
        return self.rest[role] + sum(self.groups[role][group.kind][choices[name]] for name, group in groups)

    def save(self, path: Path) -> None:
        """Writes the costs."""
        write_json(path, {"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            ConfigError: the file cannot be read, or is something else.
        """
        try:
            values: dict[str, Any] = json.loads(path.read_text("utf-8"))
            if values.pop("format") != FORMAT:
                raise ValueError(f"expected format {FORMAT}")
            costs = cls(**{**values, "workload": Workload(**values["workload"])})
            for role in ROLES:
                for kind, by_choice in costs.groups[role].items():
                    if set(by_choice) - set(CHOICES) or not all(s >= 0 for s in by_choice.values()):
                        raise ValueError(f"wrong costs of {kind}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is no file of costs: {error!r}; `elastic-jax cost --out` writes one") from None
        return costs


def group_bytes(config: ModelConfig) -> dict[str, dict[Choice, int]]:
    """Bytes that each group's weight takes on the device, by choice; a tied bf16 head is the embedding."""
    found: dict[str, dict[Choice, int]] = {}
    for name, group in model_groups(config).items():
        tied = config.tie_word_embeddings and group.kind == "lm_head"
        integer = group.parameters + 4 * group.out_size
        found[name] = {c: (0 if tied else 2 * group.parameters) if c == "bf16" else integer for c in CHOICES}
    return found


def fixed_bytes(config: ModelConfig) -> int:
    """Bytes that every plan needs beside the groups: embedding and norms, in bf16."""
    return 2 * config.hidden_size * (config.vocab_size + 2 * config.num_layers + 1)
