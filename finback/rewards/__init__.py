from finback.rewards.code import run_code

__all__ = ["run_code"]
