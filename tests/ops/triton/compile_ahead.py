"""Compile kernels for Hopper without a GPU and print their PTX: a line of standard input is a JSON list of requests, and a line of
standard output the list of answers, until the input ends.

A request is {"module", "kernel", "types", "constants", "divisible", "warps", "stages"}: the types of the arguments by name as Triton
writes them ("*bf16", "i32", "fp32"), the values of the constexpr ones, and the names of those that are known to be divisible by 16 at
the call (pointers and sizes), which is what lets the compiler read 16 bytes at once.
"""

import importlib
import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_one(request: dict) -> str:
    kernel = getattr(importlib.import_module(request["module"]), request["kernel"])
    names = kernel.arg_names
    signature = {name: "constexpr" if name in request["constants"] else request["types"][name] for name in names}
    constants = {(names.index(name),): value for name, value in request["constants"].items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in request["divisible"]}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": request.get("warps", 4), "num_stages": request.get("stages", 3)}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps([compile_one(request) for request in json.loads(line)]), flush=True)
