"""A class of modules that shows its arguments: `help`, `inspect.signature` and editors see through nnx's metaclass."""

import inspect


class _Signature:
    """`__signature__` of a class, and of none of its instances: calling those is something else."""

    def __get__(self, instance, owner) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")
        signature = inspect.signature(owner.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:], return_annotation=owner)


def shows_signature(cls: type) -> type:
    """Decorates a module, whose signature is then that of its `__init__` without self."""
    cls.__signature__ = _Signature()
    return cls
