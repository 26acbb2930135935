"""Errors a user can meet. Each message says what was expected, what was found, where, and what to do."""


class ElasticError(Exception):
    """Base of every error this project raises on purpose; the command line prints its message without a traceback."""


class ConfigError(ElasticError):
    """A model configuration holds something that is missing, malformed, or not implemented."""


class ConversionError(ElasticError):
    """Source weights cannot be converted: unknown, missing, mis-shaped or non-finite tensors, or no space."""


class CheckpointError(ElasticError):
    """An Elastic checkpoint is missing, incomplete, damaged, or lacks what was asked of it."""


class HubError(ElasticError):
    """A repository of the Hugging Face Hub cannot be found, reached, read or written."""


class PlanError(ElasticError):
    """A plan or mode is unknown, malformed, or does not fit the model it is applied to."""


class ExecutableError(ElasticError):
    """An executable store is missing, damaged, or was made for something else."""


class MismatchError(ExecutableError):
    """An executable store was made for another device, version, model, plan, or set of options."""


class TrustError(ExecutableError):
    """An executable store may have been written by somebody else, and running its native code was not allowed."""


class MemoryPlanError(ElasticError):
    """What was asked for does not fit in the device's memory."""


class DeviceMemoryError(ElasticError):
    """The device ran out of memory although what was asked for had fitted: the loaded model is of no use any more."""


class RequestError(ElasticError, ValueError):
    """A request to the engine is impossible: an empty or too long prompt, a parameter out of range."""


class TokenizerError(ElasticError):
    """A checkpoint's tokenizer is missing or lacks what was asked of it (a chat template, say)."""


class EvaluationError(ElasticError):
    """Tasks cannot be evaluated: lm-eval is missing, a task is unknown, items or stored answers are malformed."""
