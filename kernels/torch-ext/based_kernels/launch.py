# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Launches a kernel that was launched before without asking Triton again what it is.

Triton looks at each of thirty arguments to find the compiled kernel: 15 to 25 us of Python a launch. The first launch
of a key goes that way and keeps what it compiled, the next ones hand it the addresses. A compiled kernel relies on

    dtypes and constants    the key must say them
    addresses               multiples of 16
    integers                less than 2^31

and what is not in the key is looked at each time: other arguments go Triton's way. So do all of them in the interpreter
and under torch.compile, whose graph holds the launch itself.
"""

import torch


_compiled = {}


def launch(kernel, key, grid, tensors, numbers, constants):
    """kernel[grid](*tensors, *numbers, **constants).

    Args:
        kernel: its parameters in the order of pointers, numbers that are not specialised, constexprs.
        key: hashable; equal keys mean equal constants (launch options too), dtypes of the tensors and device.
        grid: one number of programs.
        constants: a function without arguments -> dict of the constexprs, num_warps and num_stages.
    """
    if torch.compiler.is_compiling():
        kernel[(grid,)](*tensors, *numbers, **constants())
        return
    addresses = [x.data_ptr() for x in tensors]
    bits = 0
    for address in addresses:
        bits |= address
    fits = bits % 16 == 0 and max(numbers) < 2**31
    found = _compiled.get((kernel.fn, key)) if fits else None
    if found is not None:
        compiled, values = found
        compiled[grid, 1, 1](*addresses, *numbers, *values)
        return
    named = constants()
    compiled = kernel[(grid,)](*tensors, *numbers, **named)
    # the interpreter returns nothing
    if fits and compiled is not None:
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        _compiled[kernel.fn, key] = compiled, tuple(named[name] for name in names)
