"""What a launch must be told, and a default that is right everywhere.

A config is a small frozen dataclass; its fields are the kernel's block sizes, warps and stages. `default` functions choose
one from the shape, the dtype and the target by rules that need no measurement. Under the interpreter time goes by programs
and loop turns, so blocks are large there.
"""
