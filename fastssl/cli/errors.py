"""What ends a command in one line instead of a traceback."""

import errno

REMEDIES = {
    errno.ENOSPC: "free some space; the same command goes on from the last checkpoint",
    errno.EDQUOT: "free some of your quota; the same command goes on from the last checkpoint",
}


def one_line(error: Exception) -> str | None:
    """The message of an error that the user can correct, None for any other."""
    if not (message := _message(error)):
        return None
    return " ".join(message.split())


def _message(error: Exception) -> str | None:
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return f"{error}; {REMEDIES[error.errno]}"
    if isinstance(error, (ValueError, ArithmeticError, OSError)):
        return str(error) or type(error).__name__
    if isinstance(error, (MemoryError, RuntimeError)):
        return _memory_message(error)
    if type(error).__module__.partition(".")[0] == "safetensors_rust":
        return f"a .safetensors file is damaged ({error})"
    return None


def _memory_message(error: MemoryError | RuntimeError) -> str | None:
    """Of `Step` as it is; of anything else with what uses less."""
    from fastssl.device import is_out_of_memory, out_of_memory_reason  # imports torch

    if not is_out_of_memory(error):
        return None
    if str(error).startswith("out of memory in"):
        return str(error)
    reason = out_of_memory_reason(error)
    return f"out of memory ({reason}); lower --batch-size, --views, --image-size or --load-size"
